// Which instruction sets this library was built for, and which one this process uses.
#pragma once

#include <string>
#include <vector>

namespace ck {

enum class Isa : int { kBaseline, kAvx2, kAvx512, kNeon };

const char* isa_name(Isa isa);
std::vector<Isa> built_isas();

// The best one that was built and that this machine supports.
Isa detected_isa();

// The one in use: detected, or lowered by CHURN_CPU_ISA or lower_isa().
Isa active_isa();

// Lowers (or restores) the instruction set by name, for calls that begin afterwards; throws
// std::invalid_argument for a name that is unknown, not built, or not supported by the machine.
void lower_isa(const std::string& name);

}  // namespace ck
