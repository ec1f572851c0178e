#include "pose.hpp"

#include <algorithm>
#include <cmath>

#include "kinetok.h"

namespace kinetok {

namespace {

constexpr double TINY = 1e-12, CENTIMETRES = 100;

void normalise(double* v, int n) {
  double square = 0;
  for (int i = 0; i < n; ++i) square += v[i] * v[i];
  const double length = std::max(std::sqrt(square), TINY);
  for (int i = 0; i < n; ++i) v[i] /= length;
}

Matrix orthonormal(double a, double b, double c, double d, double e, double f) {
  double x[3] = {a, b, c}, y[3] = {d, e, f};
  normalise(x, 3);
  const double along = x[0] * y[0] + x[1] * y[1] + x[2] * y[2];
  for (int i = 0; i < 3; ++i) y[i] -= along * x[i];
  normalise(y, 3);
  return {x[0], x[1], x[2], y[0], y[1], y[2], x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0]};
}

}  // namespace

Matrix matrix_from_6d(const float* x) { return orthonormal(x[0], x[1], x[2], x[3], x[4], x[5]); }

Matrix product(const Matrix& a, const Matrix& b) {
  Matrix out{};
  for (size_t i = 0; i < 3; ++i)
    for (size_t j = 0; j < 3; ++j) out[3 * i + j] = a[3 * i] * b[j] + a[3 * i + 1] * b[3 + j] + a[3 * i + 2] * b[6 + j];
  return out;
}

std::array<double, 4> quaternion(const Matrix& m) {
  // Four multiples of the quaternion (w x y z); the one with the largest own part is the accurate one.
  const double wx = m[7] - m[5], wy = m[2] - m[6], wz = m[3] - m[1], xy = m[1] + m[3], xz = m[2] + m[6], yz = m[5] + m[7];
  const double rows[4][4] = {{1 + m[0] + m[4] + m[8], wx, wy, wz},
                             {wx, 1 + m[0] - m[4] - m[8], xy, xz},
                             {wy, xy, 1 - m[0] + m[4] - m[8], yz},
                             {wz, xz, yz, 1 - m[0] - m[4] + m[8]}};
  int best = 0;
  for (int i = 1; i < 4; ++i)
    if (rows[i][i] > rows[best][best]) best = i;
  double q[4] = {rows[best][0], rows[best][1], rows[best][2], rows[best][3]};
  normalise(q, 4);
  const double sign = q[0] < 0 ? -1 : 1;
  return {sign * q[1], sign * q[2], sign * q[3], sign * q[0]};
}

void Walk::step(const float* frame, const Bundle& bundle) {
  // The step is seen from the frame before's heading; its vertical part is not walked.
  const double x = frame[bundle.velocity_at], z = frame[bundle.velocity_at + 1];
  x_ += back_[0] * x + back_[2] * z;
  z_ += back_[6] * x + back_[8] * z;
  // Heading H' = D H, so its inverse is back D^T; made orthonormal again, however long the walk.
  const Matrix d = matrix_from_6d(frame + bundle.heading_at);
  const Matrix turned = product(back_, {d[0], d[3], d[6], d[1], d[4], d[7], d[2], d[5], d[8]});
  back_ = orthonormal(turned[0], turned[1], turned[2], turned[3], turned[4], turned[5]);
}

Vector place_in(const Vector& p, uint32_t layout) {
  switch (layout) {
    case KT_LAYOUT_UNITY: return {-p[0], p[1], p[2]};
    case KT_LAYOUT_UNREAL: return {CENTIMETRES * p[2], -CENTIMETRES * p[0], CENTIMETRES * p[1]};
    default: return p;
  }
}

// Axes change by a mirror M, so a rotation's axis changes by -M.
static void put_rotation(const Matrix& rotation, uint32_t layout, float* out) {
  const auto q = quaternion(rotation);
  const auto put = [out](double x, double y, double z, double w) {
    out[0] = static_cast<float>(x), out[1] = static_cast<float>(y), out[2] = static_cast<float>(z), out[3] = static_cast<float>(w);
  };
  switch (layout) {
    case KT_LAYOUT_UNITY: put(q[0], -q[1], -q[2], q[3]); break;
    case KT_LAYOUT_UNREAL: put(-q[2], q[0], -q[1], q[3]); break;
    default: put(q[0], q[1], q[2], q[3]);
  }
}

void write_pose(const float* frame, const Walk& walk, const Bundle& bundle, uint32_t layout, float* out) {
  const Vector root = place_in({walk.x(), frame[bundle.positions_at + 1], walk.z()}, layout);
  for (size_t i = 0; i < 3; ++i) *out++ = static_cast<float>(root[i]);
  for (size_t joint = 0; joint < bundle.joints.size(); ++joint, out += 4) {
    Matrix local = matrix_from_6d(frame + bundle.rotations_at + 6 * joint);
    if (joint == 0) local = product(walk.back(), local);
    put_rotation(local, layout, out);
  }
}

}  // namespace kinetok
