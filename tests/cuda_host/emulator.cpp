// The emulator itself: fibers, launches, faults.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cuda_host.h"

namespace emulator {

Index thread, block;
dim3 grid;
double lanes[1024];

namespace {

// A kernel's parameters, up to 32 KiB, stand on every fiber's stack.
constexpr size_t kStack = 1 << 17;

enum class Waits { kForWarp, kForBlock, kNoMore };

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf at;
  Waits waits;
};

struct Served {
  const void* from;
  size_t bytes;
  char contents[16];
};

std::vector<Served> served;  // by the read-only cache, to the kernel that runs
jmp_buf scheduler;
Fiber fibers[1024];
const std::function<void()>* body;
int current;
cudaError_t error = cudaSuccess;
bool backwards = false;

void give_turn(Waits waits) {
  fibers[current].waits = waits;
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

// A fiber runs its thread of block after block: making one costs system calls.
void run() {
  for (;; give_turn(Waits::kNoMore)) (*body)();
}

void resume(int t) {
  Fiber& fiber = fibers[t];
  current = t;
  thread.x = unsigned(t);
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.at, 1);
  fiber.stack.reset(new char[kStack]);
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, run, 0);
  setcontext(&start);
}

int poison(dl_phdr_info* info, size_t, void* inside) {
  bool own = false;
  size_t bytes = 0;
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& part = info->dlpi_phdr[k];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    own |= part.p_type == PT_LOAD && uintptr_t(inside) - begin < part.p_memsz;
    if (part.p_type == PT_TLS) bytes = part.p_memsz;
  }
  if (own && bytes && info->dlpi_tls_data) memset(info->dlpi_tls_data, 0xFF, bytes);
  return own;
}

// The threads of one warp up to the block's next barrier. False where they disagree on what they wait for.
bool run_warp(int first, int end) {
  do {
    for (int t = first; t < end; ++t) resume(backwards ? end - 1 - (t - first) : t);
    for (int t = first; t < end; ++t) {
      if (fibers[t].waits != fibers[first].waits) return false;
    }
  } while (fibers[first].waits == Waits::kForWarp);
  return true;
}

bool run_block(int threads) {
  dl_iterate_phdr(poison, &grid);
  const int warps = (threads + 31) / 32;
  do {
    for (int k = 0; k < warps; ++k) {
      const int first = 32 * (backwards ? warps - 1 - k : k);
      if (!run_warp(first, std::min(first + 32, threads))) return false;
    }
    for (int k = 0; k < warps; ++k) {
      if (fibers[32 * k].waits != fibers[0].waits) return false;
    }
  } while (fibers[0].waits == Waits::kForBlock);
  return true;
}

}  // namespace

void barrier() { give_turn(Waits::kForBlock); }
void warp_barrier() { give_turn(Waits::kForWarp); }

void fault(cudaError_t what) {
  if (error == cudaSuccess) error = what;
}

void serve_read_only(const void* from, size_t bytes) {
  Served word{from, bytes, {}};
  memcpy(word.contents, from, bytes);
  served.push_back(word);
}

void launch(dim3 blocks, int threads, const std::function<void()>& kernel) {
  if (!blocks.x || blocks.x > 0x7FFFFFFF || !blocks.y || blocks.y > 65535 || threads < 1 || threads > 1024) {
    return fault(cudaErrorInvalidConfiguration);
  }
  grid = blocks;
  body = &kernel;
  const unsigned count = blocks.x * blocks.y;
  for (unsigned k = 0; k < count && error == cudaSuccess; ++k) {
    const unsigned number = backwards ? count - 1 - k : k;
    block = {number % blocks.x, number / blocks.x};
    if (run_block(threads)) continue;
    fault(cudaErrorLaunchFailure);
    // Those that wait in the middle of the kernel will not go on.
    for (Fiber& fiber : fibers) fiber.stack.reset();
  }
  for (const Served& word : served) {
    if (memcmp(word.contents, word.from, word.bytes)) fault(cudaErrorIllegalAddress);
  }
  served.clear();
}

}  // namespace emulator

extern "C" {

void emulator_order(bool backwards) { emulator::backwards = backwards; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::error;
  emulator::error = cudaSuccess;
  return error;
}

// What g++ calls for -fsanitize=alignment.
void __ubsan_handle_type_mismatch_v1(void*, void*) { emulator::fault(cudaErrorMisalignedAddress); }
}
