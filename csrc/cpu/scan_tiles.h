// How a scan is cut: segments of rows into tiles of fixed length, counted from where the segment's scan begins, so that
// no result depends on the number of threads or on what lies beside a segment.
#pragma once
#include <algorithm>
#include <vector>

#include "discounted_scan_kernels.h"
#include "parallel.h"
#include "segments.h"

namespace fuserl {

constexpr std::int64_t tile_tokens = 4096;

// Source::tile(segment, begin, end, carry, write, state) scans tokens [begin, end) and leaves the tile's state.
template <class Source>
class TiledScan {
 public:
  using T = typename Source::Number;

  TiledScan(const Source& source, const Segments& segments, bool forward, int threads)
      : source_(source), segments_(segments), forward_(forward), threads_(threads) {}

  void run() {
    std::int64_t longest = 0;
    for (std::int64_t i = 0; i < segments_.count(); ++i)
      longest = std::max(longest, segments_.end(i) - segments_.begin(i));
    if (threads_ > 1 && longest > tile_tokens && longest > segments_.total() / threads_) return in_tiles();
    parallel_for(segments_.count(), segments_.grain(4 * tile_tokens), threads_, whole_segments, this);
  }

 private:
  struct Tile {
    std::int64_t segment, index;
    T carry;
    ScanState<T> state;
  };

  static T passed_on(T carry, const ScanState<T>& state) {
    return carry == 0 ? state.local : state.local + state.product * carry;
  }

  std::int64_t tiles(std::int64_t segment) const {
    return (segments_.end(segment) - segments_.begin(segment) + tile_tokens - 1) / tile_tokens;
  }

  void scan(std::int64_t segment, std::int64_t index, T carry, bool write, ScanState<T>& state) const {
    const std::int64_t begin = segments_.begin(segment), end = segments_.end(segment), skip = index * tile_tokens;
    if (forward_)
      source_.tile(segment, begin + skip, std::min(begin + skip + tile_tokens, end), carry, write, state);
    else
      source_.tile(segment, std::max(end - skip - tile_tokens, begin), end - skip, carry, write, state);
  }

  static void whole_segments(void* context, std::int64_t first, std::int64_t last) {
    const TiledScan& self = *static_cast<TiledScan*>(context);
    for (std::int64_t segment = first; segment < last; ++segment) {
      T carry = 0;
      for (std::int64_t index = 0; index < self.tiles(segment); ++index) {
        ScanState<T> state;
        self.scan(segment, index, carry, true, state);
        carry = passed_on(carry, state);
      }
    }
  }

  // The first tile of a segment is done at once; of the others, first what they do to any carry, then with theirs.
  void in_tiles() {
    for (std::int64_t segment = 0; segment < segments_.count(); ++segment)
      for (std::int64_t index = 0; index < tiles(segment); ++index) tiles_.push_back({segment, index, 0, {}});
    const auto count = static_cast<std::int64_t>(tiles_.size());
    parallel_for(count, 1, threads_, first_pass, this);
    for (std::int64_t i = 1; i < count; ++i) {
      const Tile& before = tiles_[static_cast<std::size_t>(i - 1)];
      Tile& tile = tiles_[static_cast<std::size_t>(i)];
      if (tile.index > 0) tile.carry = passed_on(before.carry, before.state);
    }
    parallel_for(count, 1, threads_, second_pass, this);
  }

  static void first_pass(void* context, std::int64_t first, std::int64_t last) {
    each_tile(context, first, last, [](const TiledScan& self, Tile& tile) {
      if (tile.index == 0 || tile.index + 1 < self.tiles(tile.segment))
        self.scan(tile.segment, tile.index, 0, tile.index == 0, tile.state);
    });
  }

  static void second_pass(void* context, std::int64_t first, std::int64_t last) {
    each_tile(context, first, last, [](const TiledScan& self, const Tile& tile) {
      ScanState<T> state;
      if (tile.index > 0) self.scan(tile.segment, tile.index, tile.carry, true, state);
    });
  }

  template <class F>
  static void each_tile(void* context, std::int64_t first, std::int64_t last, F&& f) {
    TiledScan& self = *static_cast<TiledScan*>(context);
    for (std::int64_t i = first; i < last; ++i) f(self, self.tiles_[static_cast<std::size_t>(i)]);
  }

  const Source& source_;
  const Segments& segments_;
  bool forward_;
  int threads_;
  std::vector<Tile> tiles_;
};

}  // namespace fuserl
