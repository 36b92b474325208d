// Which of the copies of the row kernels runs on this machine.
#pragma once

namespace fuserl {

enum class Isa : int { baseline, avx2, avx512 };

Isa isa();  // the best this machine has, unless set_isa chose another
const char* name(Isa isa);
bool intel();  // whether the processor is Intel's, for which torch's library of matrix products was written
// For tests: throws std::invalid_argument when this machine lacks it.
void set_isa(const char* name);

}  // namespace fuserl
