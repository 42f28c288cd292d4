// How a node's work gets into its stream.
#pragma once

#include <cstddef>
#include <utility>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/scheduler.h"

namespace cenacle {

// Work with small outputs goes past MLX's count: when a hundred tasks wait, MLX stops until ten are done, so for a token
// of hundreds of tasks the thread that builds graphs would wake as often as that, and each time take a core from the
// threads that compute. Of large outputs that limit keeps memory small.
template <class F>
void enqueue(mlx::core::Stream s, size_t bytes, F&& work) {
  if (bytes <= 1 << 20)
    mlx::core::scheduler::enqueue(s, std::forward<F>(work));
  else
    mlx::core::cpu::get_command_encoder(s).dispatch(std::forward<F>(work));
}

}  // namespace cenacle
