// How the CPU walks rows: the memory is cut into fixed units, whatever the number of threads, and each unit leaves its
// own partial sums, so that every result has the same bits on one thread and on many.
//
//   runs:     a unit is up to kBlock neighbouring elements of one row (inner >= kRunLength, or a single row)
//   columns:  rows change every few elements; a unit is a tile of up to kTile memory columns (a whole number of rows)
//             times a stretch of their repetitions, with the row's numbers spread over the columns
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/philox.h"
#include "cpu/types.h"
#include "math/quantize.h"

namespace qk {

constexpr int64_t kLanes = 64;            // partial sums kept side by side in one run
constexpr int64_t kBlock = 16384;         // elements of a unit of a run
constexpr int64_t kColumnsBlock = 65536;  // elements of a unit of columns, whose sums cost more
constexpr int64_t kTile = 1024;           // columns of a tile; also the variates drawn at a time
constexpr int64_t kRunLength = 32;        // shorter runs are walked as columns
constexpr int64_t kGrain = 1 << 17;       // elements that are worth a thread

struct Walk {
  int64_t numel, rows, inner;
  bool columns;
  int64_t parts;                   // runs: blocks of a run; columns: stretches of repetitions
  int64_t count;                   // runs: runs in all; columns: tiles
  int64_t tile, repeats, stretch;  // columns only: columns of a tile, repetitions of the period, and of one unit

  Walk(int64_t numel, Layout layout) : numel(numel), rows(layout.rows), inner(layout.inner) {
    columns = rows > 1 && inner < kRunLength;
    if (!columns) {
      count = numel ? numel / inner : 0;
      parts = (inner + kBlock - 1) / kBlock;
      tile = repeats = stretch = 0;
      return;
    }
    const int64_t period = rows * inner;
    tile = std::min(period, kTile / inner * inner);
    repeats = numel / period;
    stretch = std::max<int64_t>(1, kColumnsBlock / tile);
    count = (period + tile - 1) / tile;
    parts = (repeats + stretch - 1) / stretch;
  }
  int64_t units() const { return count * parts; }
  int64_t grain() const { return std::max<int64_t>(1, kGrain * units() / std::max<int64_t>(numel, 1)); }
};

// The units of a walk along runs, one after the other. Counted: a division costs a third of a short row.
struct Run {
  const Walk& walk;
  int64_t unit, run, part, row;

  QK_HD Run(const Walk& walk, int64_t first)
      : walk(walk), unit(first), run(first / walk.parts), part(first % walk.parts), row(run % walk.rows) {}
  QK_HD int64_t begin() const { return run * walk.inner + part * kBlock; }
  QK_HD int64_t end() const { return std::min(begin() + kBlock, (run + 1) * walk.inner); }
  QK_HD void next() {
    ++unit;
    if (++part < walk.parts) return;
    part = 0, ++run;
    if (++row == walk.rows) row = 0;
  }
};

// One unit of a walk along columns: `count` columns from `column` on, in the repetitions `first` to `last`.
struct Patch {
  int64_t part, column, count, row, first, last, period;

  QK_HD Patch(const Walk& walk, int64_t unit)
      : part(unit % walk.parts),
        column(unit / walk.parts * walk.tile),
        row(column / walk.inner),
        first(part * walk.stretch),
        last(std::min(first + walk.stretch, walk.repeats)),
        period(walk.rows * walk.inner) {
    count = std::min(walk.tile, period - column);
  }
};

// Pointers to the rows' numbers. An absent offset or zero point is null.
template <class C>
struct Rows {
  const C *scale, *offset;
  const int32_t* zero_point;
  int64_t quant_min, quant_max;

  QK_HD Grid<C> grid(int64_t row) const {
    const int64_t zero = zero_point ? zero_point[row] : 0;
    return {safe_scale(scale[row]), offset ? offset[row] : C(0), C(quant_min - zero), C(quant_max - zero)};
  }
};

template <class C>
struct OneGrid {
  Grid<C> grid;
  QK_HD Grid<C> operator[](int64_t) const { return grid; }
};

template <class C>
struct ColumnGrids {
  C scale[kTile], offset[kTile], lo[kTile], hi[kTile];

  QK_HD Grid<C> operator[](int64_t j) const { return {scale[j], offset[j], lo[j], hi[j]}; }
  QK_HD void fill(const Rows<C>& rows, int64_t first_row, int64_t inner, int64_t columns) {
    for (int64_t j = 0, row = first_row; j < columns; ++row) {
      const Grid<C> grid = rows.grid(row);
      for (int64_t k = 0; k < inner; ++k, ++j) {
        scale[j] = grid.scale, offset[j] = grid.offset, lo[j] = grid.lo, hi[j] = grid.hi;
      }
    }
  }
};

// Grids without an offset: its arithmetic drops out of the loop.
template <class Grids>
struct Centred {
  const Grids& grids;
  QK_HD auto operator[](int64_t j) const {
    auto grid = grids[j];
    grid.offset = 0;
    return grid;
  }
};

// Where the variate of an element comes from: Philox at (seed, stream, index), or the caller's tensor (kShift).
template <class S>
struct Variates {
  uint64_t seed, stream;
  const S* given;
};

// The variates of `count` (<= kTile) elements from `first` on. `out` has room for kTile + 8.
template <int64_t kind, class S>
QK_HD const Compute<S>* draw(Variates<S> from, int64_t first, int64_t count, Compute<S>* out) {
  using C = Compute<S>;
  if (kind == kPlain) return out;
  if (kind == kShift) {
    for (int64_t j = 0; j < count; ++j) out[j] = load(from.given[first + j]);
    return out;
  }
  const uint64_t counter = uint64_t(first) >> 2;
  const int64_t skip = first & 3, counters = (skip + count + 3) >> 2;
  WordBlock block;
  for (int64_t begin = 0; begin < counters; begin += kCounters) {
    const int64_t length = std::min(kCounters, counters - begin);
    philox_block(from.seed, from.stream, counter + uint64_t(begin), length, block);
    C* to = out + 4 * begin;
    for (int64_t j = 0; j < length; ++j) {
      const Words words = {{block.w[0][j], block.w[1][j], block.w[2][j], block.w[3][j]}};
      if (kind == kTempering || kind == kPseudoNormal) {
        const Normals n = normals(words);
        for (int k = 0; k < 4; ++k) to[4 * j + k] = C(kind == kPseudoNormal ? 0.5f * n.n[k] : n.n[k]);
      } else {
        for (int k = 0; k < 4; ++k) to[4 * j + k] = C(uniform(words.w[k]) - (kind == kStochastic ? 0.0f : 0.5f));
      }
    }
  }
  return out + skip;
}

}  // namespace qk
