// Python module _C: build facts, and the constants that Python code shares with csrc/rows.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "cpu/isa.h"
#include "rows/constants.h"
#include "rows/exact.h"
#include "rows/hash.h"
#include "rows/superaccumulator.h"

namespace py = pybind11;

namespace {

std::vector<std::string> built_isa_names() {
  std::vector<std::string> names;
  for (const ck::Isa isa : ck::built_isas()) names.emplace_back(ck::isa_name(isa));
  return names;
}

py::dict build_info() {
  constexpr std::string_view commit = CK_GIT_COMMIT;
  py::dict info;
  info["compiler"] = CK_COMPILER;
  info["flags"] = CK_FLAGS;
  info["instruction_sets"] = built_isa_names();
  info["detected_cpu_isa"] = ck::isa_name(ck::detected_isa());
  info["cuda_architectures"] = py::list();
  info["torch_version"] = CK_TORCH_VERSION;
  info["torch_target_version"] = CK_TORCH_TARGET;
  info["git_commit"] = commit.empty() ? py::object(py::none()) : py::object(py::str(commit));
  return info;
}

// The coefficients of exp_nonpos, log_pos and exp_series in rows/math.h, highest power first.
template <class S>
py::dict format() {
  using F = ck::rows::Format<S>;
  std::vector<S> exp_terms, log_terms, series_terms;
  for (int i = 0; i < F::kExpTerms; ++i) exp_terms.push_back(F::exp_term(i));
  for (int i = 0; i < F::kLogTerms; ++i) log_terms.push_back(F::log_term(i));
  for (int i = ck::rows::kSeriesTerms<S> + 1; i >= 2; --i) {
    series_terms.push_back(static_cast<S>(ck::rows::inverse_factorial(i)));
  }
  py::dict found;
  found["kMantissaBits"] = F::kMantissaBits;
  found["kShift"] = F::kShift;
  found["kExpLowest"] = F::kExpLowest;
  found["kLn2High"] = F::kLn2High;
  found["kLn2Low"] = F::kLn2Low;
  found["kSqrtHalf"] = F::kSqrtHalf;
  found["exp_terms"] = exp_terms;
  found["log_terms"] = log_terms;
  found["series_terms"] = series_terms;
  return found;
}

}  // namespace

std::vector<std::vector<uint32_t>> hash_keys() {
  const ck::rows::HashKeys keys = ck::rows::make_hash_keys();
  std::vector<std::vector<uint32_t>> lists;
  for (const auto& of_word : keys) lists.emplace_back(of_word.begin(), of_word.end());
  return lists;
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about the build, and the constants of the row arithmetic.";
  module.def(
      "build_info", &build_info,
      "How the library was built: compiler, floating-point flags, instruction sets built and "
      "the best one here, CUDA architectures, torch built with and oldest torch "
      "supported, git commit (None outside a repository).");

  py::module_ constants = module.def_submodule("constants", "Constants of the row arithmetic.");
  constants.attr("kVectorBytes") = ck::kVectorBytes;
  constants.attr("kLanesFloat") = ck::kLanes<float>;
  constants.attr("kLanesDouble") = ck::kLanes<double>;
  constants.attr("kChunk") = ck::kChunk;
  constants.attr("kBlock") = ck::kBlock;
  constants.attr("kLowestFloat") = ck::kLowest<float>;
  constants.attr("kLowestDouble") = ck::kLowest<double>;
  constants.attr("kSumLanes") = ck::kSumLanes;
  constants.attr("kSumWords") = ck::kSumWords;
  constants.attr("kReach") = ck::rows::kReach;
  constants.attr("kLeastPeak") = ck::rows::kLeastPeak;
  constants.attr("kLeastExponent") = ck::rows::kLeastExponent;
  constants.attr("kRounding") = ck::rows::kRounding;
  constants.attr("kDifferenceRounding") = ck::rows::kDifferenceRounding;
  constants.attr("kUntaught") = ck::rows::kUntaught;
  constants.attr("kNear") = ck::rows::kNear;
  constants.attr("kWeightless") = ck::kWeightless;
  constants.attr("Float") = format<float>();
  constants.attr("Double") = format<double>();
  constants.def(
      "places", [](int64_t classes) { return ck::rows::places(classes); }, py::arg("classes"),
      "Binary places of exact mode's sums over this many classes.");
  constants.attr("kExactSpec") = ck::kExactSpec;
  constants.attr("kHashSpec") = ck::kHashSpec;
  constants.attr("kHashPart") = ck::kHashPart;
  constants.attr("kHashBlock") = ck::kHashBlock;
  constants.attr("kHashWords") = ck::kHashWords;
  constants.attr("hash_keys") = hash_keys();
  constants.attr("kHashStep") = ck::kHashStep;
  constants.def(
      "hash_block_key", [](int word, int64_t block) { return ck::rows::block_key(word, block); },
      py::arg("word"), py::arg("block"), "Factor of the keys of a block of places.");
}
