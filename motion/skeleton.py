"""The 22-joint body of SMPL's tree (section 5), with proportions of our own."""

JOINT_NAMES = (
    "pelvis",
    "left_hip",
    "right_hip",
    "spine1",
    "left_knee",
    "right_knee",
    "spine2",
    "left_ankle",
    "right_ankle",
    "spine3",
    "left_foot",
    "right_foot",
    "neck",
    "left_collar",
    "right_collar",
    "head",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
)
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)
LEFT_RIGHT = ((1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21))
CHAINS = (
    (0, 2, 5, 8, 11),
    (0, 1, 4, 7, 10),
    (0, 3, 6, 9, 12, 15),
    (9, 14, 17, 19, 21),
    (9, 13, 16, 18, 20),
)
JOINTS = len(JOINT_NAMES)
FPS = 30.0

# Metres from the parent in the T-pose (facing +Z, left along +X): the mean of 20 skeletons of the CMU Graphics Lab Motion
# Capture Database, made symmetric. SMPL's own offsets come under a licence that does not allow shipping them.
CANONICAL_OFFSETS = (
    (0.0, 0.0, 0.0),
    (0.09078, -0.09413, 0.03947),
    (-0.09078, -0.09413, 0.03947),
    (0.0, 0.06054, -0.0038),
    (0.0, -0.39635, 0.0),
    (0.0, -0.39635, 0.0),
    (0.0, 0.06172, -0.0038),
    (0.0, -0.43143, 0.0),
    (0.0, -0.43143, 0.0),
    (0.0, 0.11471, -0.00048),
    (0.0, -0.02987, 0.11485),
    (0.0, -0.02987, 0.11485),
    (0.0, 0.11873, 0.00116),
    (0.05611, 0.13168, -0.0018),
    (-0.05611, 0.13168, -0.0018),
    (0.0, 0.18499, -0.02361),
    (0.1233, 0.0462, -0.00591),
    (-0.1233, 0.0462, -0.00591),
    (0.29583, 0.0, 0.0),
    (-0.29583, 0.0, 0.0),
    (0.27576, 0.0, 0.0),
    (-0.27576, 0.0, 0.0),
)
