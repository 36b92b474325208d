// Rollouts and the groups they are of, as the ops that look at every member of a group see them.
#pragma once
#include <string>

#include "check.h"

namespace fuserl {

// Every id must be that of a group, of which there are at most as many as rollouts.
inline void check_ids(const char* function, const TensorView& group) {
  const std::int64_t n = group.size();
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t id = group.as<std::int64_t>()[i];
    if (id < 0 || id >= n)
      refuse(function, "group must hold ids in [0, " + std::to_string(n) + ")",
             std::to_string(id) + " at index " + std::to_string(i), "Number the groups from 0.");
  }
}

}  // namespace fuserl
