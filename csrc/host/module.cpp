// pyrl._host: planners over integer arrays, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "best_fit.h"

namespace py = pybind11;

// Any strides, but only int64: a silent cast of floating lengths would hide a caller's mistake.
using Int64 = py::array_t<int64_t, 0>;

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
}
