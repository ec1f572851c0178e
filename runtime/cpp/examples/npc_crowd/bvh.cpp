#include "bvh.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

namespace {

constexpr double DEGREES = 57.29577951308232;
constexpr double TIP = 0.08;  // metres from a last joint to its end

void visit(std::FILE* file, const std::vector<Joint>& joints, size_t joint, int depth, std::vector<size_t>& order) {
  const std::string pad(static_cast<size_t>(2 * depth), ' ');
  const Joint& j = joints[joint];
  order.push_back(joint);
  std::fprintf(file, "%s%s %s\n%s{\n", pad.c_str(), depth ? "JOINT" : "ROOT", j.name.c_str(), pad.c_str());
  const float zero[3] = {0, 0, 0};
  const float* o = depth ? j.offset : zero;
  std::fprintf(file, "%s  OFFSET %.6f %.6f %.6f\n", pad.c_str(), o[0], o[1], o[2]);
  std::fprintf(file, "%s  CHANNELS %s\n", pad.c_str(),
               depth ? "3 Zrotation Yrotation Xrotation" : "6 Xposition Yposition Zposition Zrotation Yrotation Xrotation");
  bool last = true;
  for (size_t child = joint + 1; child < joints.size(); ++child) {
    if (joints[child].parent != static_cast<int>(joint)) continue;
    visit(file, joints, child, depth + 1, order);
    last = false;
  }
  if (last) {
    const double length = std::max(1e-9, std::sqrt(double{o[0]} * o[0] + double{o[1]} * o[1] + double{o[2]} * o[2]));
    std::fprintf(file, "%s  End Site\n%s  {\n%s    OFFSET %.6f %.6f %.6f\n%s  }\n", pad.c_str(), pad.c_str(), pad.c_str(),
                 TIP * o[0] / length, TIP * o[1] / length, TIP * o[2] / length, pad.c_str());
  }
  std::fprintf(file, "%s}\n", pad.c_str());
}

// A quaternion x y z w as rotations about Z, then the new Y, then the new X.
void euler(const float* q, double* zyx) {
  const double x = q[0], y = q[1], z = q[2], w = q[3];
  zyx[0] = std::atan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)) * DEGREES;
  zyx[1] = std::asin(std::min(1.0, std::max(-1.0, 2 * (w * y - x * z)))) * DEGREES;
  zyx[2] = std::atan2(2 * (y * z + w * x), 1 - 2 * (x * x + y * y)) * DEGREES;
}

}  // namespace

bool write_bvh(const std::string& path, const std::vector<Joint>& joints, const std::vector<float>& frames, double frame_rate) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (!file) return false;
  std::vector<size_t> order;
  std::fprintf(file, "HIERARCHY\n");
  visit(file, joints, 0, 0, order);
  const size_t numbers = 3 + 4 * joints.size();
  std::fprintf(file, "MOTION\nFrames: %zu\nFrame Time: %.8f\n", frames.size() / numbers, 1 / frame_rate);
  for (size_t at = 0; at + numbers <= frames.size(); at += numbers) {
    const float* frame = frames.data() + at;
    std::fprintf(file, "%.5f %.5f %.5f", frame[0], frame[1], frame[2]);
    for (const size_t joint : order) {
      double zyx[3];
      euler(frame + 3 + 4 * joint, zyx);
      std::fprintf(file, " %.4f %.4f %.4f", zyx[0], zyx[1], zyx[2]);
    }
    std::fprintf(file, "\n");
  }
  const bool whole = !std::ferror(file);
  return std::fclose(file) == 0 && whole;
}
