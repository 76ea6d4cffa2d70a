// How the GPU walks rows: the memory is cut into fixed units, whatever the grid, and each unit leaves its own partial
// sums, so that results have the same bits on every device.
//
// Memory is read in chunks of 4 or 8 elements that begin at a multiple of their length: vector accesses stay aligned
// whatever a row's first element is, and a chunk holds whole Philox counters.
//
//   runs:     a team of threads takes a unit: up to `unit` elements of one run of one row
//   columns:  rows change every few elements; a thread keeps the chunk of columns it has and strides over repetitions.
//             The repeated line is the shortest number of periods (rows * inner) that is whole in chunks
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

#include "math/layout.h"

namespace qk {

constexpr int kThreads = 256;
#ifndef QK_MAX_BLOCKS
#define QK_MAX_BLOCKS 8192
#endif
// A test lowers it, so that few elements reach the strides over the grid.
constexpr int kMaxBlocks = QK_MAX_BLOCKS;
// Elements of a chunk of columns: each has its own row's numbers and sums in registers.
constexpr int kColumns = 4;

struct Walk {
  int64_t numel, rows, inner;
  int64_t units = 0, parts = 1;
  int64_t unit = 0;                          // runs: elements of a part, a multiple of 8
  int64_t line = 0, tiles = 1, stretch = 1;  // columns: elements of a line, tiles of it, lines of a part
  int team = kThreads;                       // runs: threads of a unit, a power of two
  int across = 1, down = kThreads;           // columns: a block covers across chunks of `down` lines at a time
  bool columns;

  Walk(int64_t numel, Layout layout) : numel(numel), rows(layout.rows), inner(layout.inner) {
    const int64_t period = rows * inner, repeats = numel / period;
    // Few repetitions of long periods would leave nearly as many partial sums as elements.
    columns = rows > 1 && (inner < 8 || (inner < 32 && repeats >= 8));
    if (numel == 0) return;
    columns ? cut_columns(period) : cut_runs();
  }

  // How many elements of a chunk of columns exist.
  QK_HD int left(int64_t i) const { return numel - i < kColumns ? int(numel - i) : kColumns; }
  int64_t runs() const { return numel / inner; }
  int blocks() const {
    const int64_t teams = columns ? 1 : kThreads / team;
    return int(std::min<int64_t>((units + teams - 1) / teams, kMaxBlocks));
  }
  // Partial sums of a row come in `repetitions` stretches of `adjacent` neighbours, rows * adjacent apart.
  int64_t partials() const { return columns ? parts * line : units; }
  int64_t adjacent() const { return columns ? inner : parts; }
  int64_t repetitions() const { return numel ? partials() / (rows * adjacent()) : 0; }
  bool one_partial_per_row() const { return numel && partials() == rows; }

 private:
  void cut_runs() {
    // Two to four chunks of a short run for each thread: they are loaded together, and the row's numbers are few.
    team = 2;
    while (team < 32 && inner > 16 * team) team *= 2;
    if (inner > 1024) team = kThreads;
    // Small tensors are spread over many multiprocessors; large ones leave few partial sums.
    unit = 2048;
    while (unit < 16384 && numel > unit * 1024) unit *= 2;
    // A run that begins between multiples of 8 reaches into one more chunk.
    const int64_t reach = inner + (inner % 8 && runs() > 1 ? 7 : 0);
    // A row in one piece, where that leaves enough of them, needs no second kernel for its sums.
    if (inner <= unit + unit / 2 || (inner <= 16384 && runs() >= 64)) unit = (reach + 7) / 8 * 8;
    parts = (reach + unit - 1) / unit;
    units = runs() * parts;
  }

  void cut_columns(int64_t period) {
    line = period / std::gcd(period, int64_t(kColumns)) * kColumns;
    const int64_t chunks = line / kColumns, lines = (numel + line - 1) / line;
    tiles = (chunks + kThreads - 1) / kThreads;
    across = int((chunks + tiles - 1) / tiles);
    down = kThreads / across;
    const int64_t steps = (lines + down - 1) / down;
    // Some waves of blocks, so that the last one, which leaves multiprocessors idle, is a small share of them.
    stretch = down * std::clamp<int64_t>(steps * tiles / 2048, 2, 64);
    parts = (lines + stretch - 1) / stretch;
    units = tiles * parts;
  }
};

// The elements [base + head, base + stop) of one row. base is a multiple of 8, so chunks count from it.
struct Span {
  int64_t row, base;
  int head, stop;
};

QK_HD Span span_of(const Walk& walk, int64_t unit) {
  const int64_t run = walk.parts == 1 ? unit : unit / walk.parts, part = unit - run * walk.parts;
  const int64_t begin = run * walk.inner, base = begin / 8 * 8 + part * walk.unit;
  const int64_t end = begin + walk.inner, stop = end < base + walk.unit ? end : base + walk.unit;
  return {run < walk.rows ? run : run % walk.rows, base, begin > base ? int(begin - base) : 0,
          stop > base ? int(stop - base) : 0};
}

// The chunk of columns of thread (c, r) in a unit: its first element, the stride to its next line, the end.
struct Strip {
  int64_t column, first, stride, stop;
};

QK_HD Strip strip_of(const Walk& walk, int64_t unit, int c, int r) {
  const int64_t part = unit / walk.tiles, tile = unit - part * walk.tiles;
  const int64_t column = (tile * walk.across + c) * kColumns, lines = (part + 1) * walk.stretch * walk.line;
  const bool idle = r >= walk.down || column >= walk.line;
  return {column, (part * walk.stretch + r) * walk.line + column, walk.down * walk.line,
          idle ? 0 : (lines < walk.numel ? lines : walk.numel)};
}

}  // namespace qk
