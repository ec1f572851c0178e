// From the model's 272 numbers to a root and rotations in an engine's axes (docs/cpp.md, coordinates). In double precision.
#pragma once

#include <array>
#include <cstdint>

#include "bundle.hpp"

namespace kinetok {

using Matrix = std::array<double, 9>;  // row-major, acts on column vectors
using Vector = std::array<double, 3>;

Matrix matrix_from_6d(const float* x);  // two rows, made orthonormal
Matrix product(const Matrix& a, const Matrix& b);
std::array<double, 4> quaternion(const Matrix& rotation);  // x y z w, w >= 0

// Where a character stands: headings multiplied up, steps added up. A clip begins at the origin, facing +Z.
class Walk {
 public:
  void step(const float* frame, const Bundle& bundle);
  const Matrix& back() const { return back_; }
  double x() const { return x_; }
  double z() const { return z_; }

 private:
  Matrix back_{1, 0, 0, 0, 1, 0, 0, 0, 1};  // the inverse heading
  double x_ = 0, z_ = 0;
};

inline uint32_t pose_floats(const Bundle& bundle) { return 3 + 4 * static_cast<uint32_t>(bundle.joints.size()); }
Vector place_in(const Vector& metres, uint32_t layout);
// A frame's pose after walk.step(frame): pose_floats(bundle) numbers.
void write_pose(const float* frame, const Walk& walk, const Bundle& bundle, uint32_t layout, float* out);

}  // namespace kinetok
