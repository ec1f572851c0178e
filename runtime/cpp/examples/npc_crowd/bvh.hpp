// A BVH file: metres, Y up, facing +Z, rotations Z Y X in degrees.
#pragma once

#include <string>
#include <vector>

struct Joint {
  std::string name;
  int parent;
  float offset[3];
};

// frames: of 3 + 4 * joints numbers as in KT_LAYOUT_GLTF. False where the file cannot be written.
bool write_bvh(const std::string& path, const std::vector<Joint>& joints, const std::vector<float>& frames, double frame_rate);
