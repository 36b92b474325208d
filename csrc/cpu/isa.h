// Which of the copies of the row kernels runs on this machine.
#pragma once

namespace fuserl {

enum class Isa : int { baseline, avx2, avx512 };

Isa isa();  // the best this machine has, unless set_isa chose another
const char* name(Isa isa);
// For tests: throws std::invalid_argument when this machine lacks it.
void set_isa(const char* name);

}  // namespace fuserl
