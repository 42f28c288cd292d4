// Which replica computes what: the rule of src/cenacle/model/balance.py, for use inside the graph.
//
// Owns: dealing a call's active experts to the ranks that hold them. Does not know: MLX, kernels.
// Invariant: the same integers as the Python rule, which a test compares; see there for why.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace cenacle {

struct ReplicaAssigner {
  std::vector<std::vector<int>> holders;  // of each expert, ascending
  std::vector<int64_t> speeds;            // of each rank
  int rank = 0;                           // ours

  static constexpr int64_t FEW_TOKENS_PER_EXPERT = 4;

  // The rank that computes each expert, -1: nobody chose it.
  std::vector<int> assign(std::vector<int64_t> counts) const {
    int64_t active = 0, pairs = 0;
    for (size_t e = 0; e < counts.size(); e++) {
      if (holders[e].empty()) counts[e] = 0;
      active += counts[e] > 0, pairs += counts[e];
    }
    return pairs <= FEW_TOKENS_PER_EXPERT * active ? assign_experts(counts) : assign_tokens(counts);
  }

 private:
  bool less(int64_t work, int a, int64_t other, int b) const {
    return work * speeds[b] < other * speeds[a];
  }

  std::vector<int> assign_experts(const std::vector<int64_t>& counts) const {
    const int ranks = int(speeds.size()), n = int(counts.size());
    std::vector<int> assigned(n, -1), moved(ranks), queue;
    std::vector<int64_t> load(ranks, 0);
    for (int expert = 0; expert < n; expert++) {
      if (!counts[expert]) continue;
      std::fill(moved.begin(), moved.end(), -1);
      queue.clear();
      for (const int r : holders[expert]) moved[r] = expert, queue.push_back(r);
      for (size_t i = 0; i < queue.size(); i++) {
        const int from = queue[i];
        for (int other = 0; other < expert; other++) {
          if (assigned[other] != from) continue;
          for (const int to : holders[other])
            if (moved[to] < 0) moved[to] = other, queue.push_back(to);
        }
      }
      int best = -1;
      for (int r = 0; r < ranks; r++)
        if (moved[r] >= 0 && (best < 0 || less(load[r] + 1, r, load[best] + 1, best))) best = r;
      load[best]++;
      while (moved[best] != expert) {
        const int other = moved[best];
        std::swap(best, assigned[other]);
      }
      assigned[expert] = best;
    }
    return assigned;
  }

  std::vector<int> assign_tokens(const std::vector<int64_t>& counts) const {
    std::vector<int> assigned(counts.size(), -1), order(counts.size());
    std::vector<int64_t> load(speeds.size(), 0);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return counts[a] > counts[b]; });
    for (const int expert : order) {
      const int64_t count = counts[expert];
      if (!count) break;
      int best = -1;
      for (const int r : holders[expert])
        if (best < 0 || less(load[r] + count, r, load[best] + count, best)) best = r;
      load[best] += count;
      assigned[expert] = best;
    }
    return assigned;
  }
};

}  // namespace cenacle
