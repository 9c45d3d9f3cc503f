// pyrl._host: planners over integer arrays, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "best_fit.h"
#include "prefix_tree.h"

namespace py = pybind11;

// Any strides, but only int64: a silent cast of floating lengths would hide a caller's mistake.
using Int64 = py::array_t<int64_t, 0>;

using Int64C = py::array_t<int64_t, py::array::c_style>;

// A vector handed to numpy without a copy.
static py::array own(std::vector<int64_t>&& values) {
  auto held = std::make_unique<std::vector<int64_t>>(std::move(values));
  const auto* data = held->data();
  const auto size = static_cast<py::ssize_t>(held->size());
  py::capsule free(held.release(),
                   [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(size, data, free);
}

// pyrl.packing.prefix_tree checks the arguments and names what is wrong; this keeps a direct call
// from reading beyond the arrays.
static void check(const pyrl::host::Sequences& s, int64_t tokens, int64_t capacity) {
  if (s.offsets[0] != 0 || s.offsets[s.count] != tokens) {
    throw py::value_error("offsets: expected 0 first and " + std::to_string(tokens) + " last");
  }
  for (pyrl::host::Id i = 0; i < s.count; ++i) {
    const int64_t length = s.offsets[i + 1] - s.offsets[i];
    if (length < 1 || length > capacity || s.shareable[i] < 0 || s.shareable[i] > length) {
      throw py::value_error("sequence " + std::to_string(i) + ": length " +
                            std::to_string(length) + ", shareable " +
                            std::to_string(s.shareable[i]) + ", capacity " +
                            std::to_string(capacity));
    }
  }
}

static py::tuple plan_tree(const Int64C& tokens, const Int64C& offsets, const Int64C& shareable,
                           int64_t capacity, double segment_cost, double area_cost) {
  using namespace pyrl::host;
  if (tokens.ndim() != 1 || offsets.ndim() != 1 || shareable.ndim() != 1 ||
      offsets.size() != shareable.size() + 1) {
    throw py::value_error("expected tokens[N], offsets[S + 1], shareable[S]");
  }
  if (shareable.size() >= py::ssize_t{1} << 29) {
    throw py::value_error("too many sequences: " + std::to_string(shareable.size()));
  }
  if (!(segment_cost >= 0 && area_cost >= 0 && std::isfinite(segment_cost + area_cost))) {
    throw py::value_error("expected finite costs >= 0");
  }
  const Sequences sequences{tokens.data(), offsets.data(), shareable.data(),
                            static_cast<Id>(shareable.size())};
  Layout out;
  {
    py::gil_scoped_release release;
    check(sequences, tokens.size(), capacity);
    out = plan_tree(sequences, capacity, {segment_cost, area_cost});
  }
  return py::make_tuple(own(std::move(out.row)), own(std::move(out.parent)),
                        own(std::move(out.subtree)), own(std::move(out.sequence)),
                        own(std::move(out.begin)), own(std::move(out.end)),
                        own(std::move(out.leaf)));
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Planners over integer arrays.";
  m.def(
      "best_fit",
      [](const Int64& lengths, int64_t capacity) {
        if (lengths.ndim() != 1) {
          throw py::value_error("lengths must be one-dimensional, got " +
                                std::to_string(lengths.ndim()) + " dimensions");
        }
        const int64_t n = lengths.shape(0);
        const auto view = lengths.unchecked<1>();
        std::vector<int64_t> length(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) {
          length[i] = view(i);
          if (length[i] < 0 || length[i] > capacity) {
            throw py::value_error("lengths[" + std::to_string(i) +
                                  "]=" + std::to_string(length[i]) +
                                  ": expected a length in [0, capacity=" +
                                  std::to_string(capacity) + "]");
          }
        }
        Int64 bins(n);
        int64_t* bin = bins.mutable_data();
        {
          py::gil_scoped_release release;
          pyrl::host::best_fit(length.data(), n, capacity, bin);
        }
        return bins;
      },
      py::arg("lengths").noconvert(), py::arg("capacity"),
      "best_fit(lengths: int64[n], capacity) -> int64[n]\n\n"
      "Bin of every item by best-fit decreasing: items by falling length (ties by index) go to\n"
      "the bin with the least room that still holds them (ties by bin number), else to a new\n"
      "bin. "
      "O(n log n). ValueError names the first length that is negative or above the capacity.");
  m.def("plan_tree", &plan_tree, py::arg("tokens").noconvert(), py::arg("offsets").noconvert(),
        py::arg("shareable").noconvert(), py::arg("capacity"), py::arg("segment_cost"),
        py::arg("area_cost"),
        "plan_tree(tokens: int64[N], offsets: int64[S + 1], shareable: int64[S], capacity,\n"
        "          segment_cost, area_cost) -> row, parent, subtree, sequence, begin, end (int64[G]\n"
        "each) and leaf (int64[S]): the fields of pyrl.packing.prefix_tree.TreeLayout.\n"
        "O(N + S log S); the GIL is released. The arrays must be contiguous.");
}
