// Groups of a row: which one a column lies in, and how the lanes of a warp share out groups, a run of columns to a
// lane.
#pragma once

#include "qft/cuda/warps.cuh"

namespace qft::QFT_ISA {

// A group is a power of two of at least 32 columns, or the whole row.
struct GroupSize {
  int shift;  // log2 of the columns; beyond any row for the whole row

  GroupSize(int64_t group, int64_t groups) : shift(0) {
    if (groups <= 1)
      shift = 62;
    else
      while (int64_t{1} << shift < group) shift++;
  }

  __device__ __forceinline__ int64_t of(int64_t column) const { return column >> shift; }
};

// One group to 1, 2, 4 .. 32 lanes of `run` columns each, in several passes where 32 lanes do not cover it; small
// groups side by side.
struct GroupLanes {
  int64_t groups;   // of a row
  int64_t columns;  // of a group
  int run;          // columns of a lane
  int shift;        // log2 of the lanes that take a group

  GroupLanes(int64_t group, int64_t groups_of_row, int columns_of_lane)
      : groups(groups_of_row), columns(group), run(columns_of_lane), shift(0) {
    while (shift < 5 && (groups <= 1 || run << shift < group)) shift++;
  }

  QFT_HOST_DEVICE int lanes() const { return 1 << shift; }
  QFT_HOST_DEVICE int side_by_side() const { return kWarp >> shift; }
  // columns that the lanes of a group take in one pass
  QFT_HOST_DEVICE int pass() const { return run << shift; }
  // pieces of a row
  QFT_HOST_DEVICE int64_t parts() const { return (groups + side_by_side() - 1) >> (5 - shift); }
};

// The place of one lane in a piece.
struct GroupLane {
  int64_t group;        // may lie past the row's last: such a lane only takes part in exchanges
  int64_t first, last;  // columns of the group, none past the row's last
  int lane;             // among those of the group
  bool leads;           // writes what the group comes to

  __device__ __forceinline__ GroupLane(const GroupLanes& g, int64_t part, int64_t in)
      : group((part << (5 - g.shift)) + (lane_of_warp() >> g.shift)), lane(lane_of_warp() & (g.lanes() - 1)) {
    const bool real = group < g.groups;
    first = real ? group * g.columns : 0;
    last = !real ? 0 : group + 1 == g.groups ? in : first + g.columns;
    leads = real && lane == 0;
  }
};

// Calls exchange(distance) for the distances over which lanes exchange what a group comes to, the same for each of
// them.
template <class Exchange>
__device__ __forceinline__ void across_group(const GroupLanes& g, Exchange exchange) {
  if (g.shift > 0) exchange(1);
  if (g.shift > 1) exchange(2);
  if (g.shift > 2) exchange(4);
  if (g.shift > 3) exchange(8);
  if (g.shift > 4) exchange(16);
}

}  // namespace qft::QFT_ISA
