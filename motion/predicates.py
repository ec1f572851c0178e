"""Does the figure walk, jump, wave? Yes or no from joints ``[T, 22, 3]`` (``kinetok.motion.measures`` says which).

Each limit stands where the real clips of ``data/cmu`` that show the action and those that show others lie apart; the
comments give the figures (of the middle six seconds of a clip).
"""

from numpy.typing import ArrayLike

from kinetok.motion import measures as m

# Walking clips go at 0.89 to 1.98 m/s over their fastest two seconds, sneaking ones at 0.31 to 0.48, running ones from 1.87
# (the lowest, of which the next is 2.46).
WALK_PACE, RUN_PACE = 0.7, 2.0
# Head above pelvis: walking 0.52 to 0.54 m, sneaking 0.42 to 0.47.
UPRIGHT, STOOPED = 0.49, 0.35
# Pelvis above the standing foot: standing and walking 0.91 to 0.97 m, karate 0.64 to 0.82 (one clip in twenty above).
STANCE = 0.85
# Mean speed of the limbs: standing clips up to 0.16 m/s (99 %), dancing ones from 0.37 (95 %), salsa from 0.37.
LIMBS_STILL, LIMBS_MOVE = 0.2, 0.35
# Standing and straight walking turn less than 0.24 rad in 95 of 100 clips; clips said to turn, 0.68 and more (but for one
# that "veers" by 0.21).
TURN = 0.5


def stands_still(joints: ArrayLike) -> bool:
    # Standing clips shift their weight over up to 0.39 m of path (95 %) at 0.10 m/s and 0.04 m of height, turn by up to
    # 0.50 rad and move a hand or foot at up to 1.35 m/s (99 %).
    return (
        m.path(joints) < 0.8
        and m.pace(joints) < 0.25
        and m.pelvis_range(joints) < 0.1
        and abs(m.turned(joints)) < 0.6
        and m.limb_speed(joints) < LIMBS_STILL
        and m.peak_speed(joints) < 1.5
        and m.trunk(joints) > UPRIGHT
        and m.pelvis_height(joints) > STANCE
    )


def walks_forward(joints: ArrayLike) -> bool:
    return (
        m.ahead(joints) > 1.0
        and WALK_PACE < m.pace(joints) < RUN_PACE
        and m.trunk(joints) > UPRIGHT
        and m.pelvis_height(joints) > STANCE
        and not m.flights(joints)
    )


def walks_backwards(joints: ArrayLike) -> bool:
    return m.ahead(joints) < -1.0 and m.pace(joints) < RUN_PACE and m.trunk(joints) > STOOPED


def sneaks(joints: ArrayLike) -> bool:
    """Travels slower than any walk, stooped."""
    # Sneaking covers 1.6 to 2.4 m in six seconds or fewer.
    return m.path(joints) > 1.0 and m.pace(joints) < WALK_PACE and STOOPED < m.trunk(joints) < UPRIGHT


def runs(joints: ArrayLike) -> bool:
    """Faster than any walk, the way it faces."""
    return m.ahead(joints) > 1.0 and m.pace(joints) >= RUN_PACE and m.trunk(joints) > STOOPED


def turns_left(joints: ArrayLike) -> bool:
    return m.turned(joints) > TURN


def turns_right(joints: ArrayLike) -> bool:
    return m.turned(joints) < -TURN


def jumps(joints: ArrayLike) -> bool:
    # Jumping clips raise both feet by 0.10 m and the pelvis by 0.13 m (95 %) for 7 frames and more; high kicks and runs get
    # to 0.09 m, on tiptoe and between strides.
    return bool(m.flights(joints, top=0.1, rise=0.08, frames=4)) and m.pace(joints) < 3.0


def hops(joints: ArrayLike) -> bool:
    """Flights, low ones too, and slower than a run, whose strides can be flights."""
    # Hopping clips go at 0.93 m/s at most.
    return bool(m.flights(joints, top=0.1, rise=0.05, frames=4)) and m.pace(joints) < RUN_PACE


def kicks(joints: ArrayLike) -> bool:
    """One foot above the other knee, its leg stretched: a runner's heel gets there with the knee bent."""
    return m.kick_height(joints) > 0.0


def punches(joints: ArrayLike) -> bool:
    # Boxing reaches 1.9 to 2.6 m/s, lunge punches 3.8 to 4.1; salsa stays below 1.5 (95 %), standing and walking at 0.
    return m.strike_speed(joints) > 1.8


def waves(joints: ArrayLike) -> bool:
    """A hand above its shoulder goes to and fro, on the spot."""
    # People who wave cars on stand at up to 0.37 m/s; dancers, whose raised arms swing too, step at 0.42 and more (95 %).
    return m.wave_reversals(joints) >= 2 and m.pace(joints) < 0.4


def dances(joints: ArrayLike) -> bool:
    """Limbs move, the body hardly travels."""
    # Nine dances of ten end within 1.8 m of where they began; walks go 2.2 m and more (95 %).
    return m.limb_speed(joints) > LIMBS_MOVE and m.net_travel(joints) < 2.0 and m.pace(joints) < RUN_PACE


def dances_salsa(joints: ArrayLike) -> bool:
    """Quick small steps on the spot, upright, both feet near the floor."""
    # Salsa clips step at 0.42 to 0.76 m/s (90 %) and end within 1.35 m.
    return (
        m.limb_speed(joints) > LIMBS_MOVE
        and m.net_travel(joints) < 1.5
        and 0.3 < m.pace(joints) < 0.9
        and m.trunk(joints) > 0.51
        and m.pelvis_height(joints) > 0.88
        and m.kick_height(joints) < 0.0
        and not m.flights(joints)
    )


def practices_karate(joints: ArrayLike) -> bool:
    """Deep stances with a fast hand or foot now and then, the trunk upright."""
    return (
        m.pelvis_height(joints) < STANCE
        and m.trunk(joints) > 0.47
        and m.peak_speed(joints) > 2.0
        and m.limb_speed(joints) > 0.25
        and m.pace(joints) < RUN_PACE
    )


def dribbles(joints: ArrayLike) -> bool:
    """A hand goes up and down at waist height, at least twice each way."""
    # Three of four dribbling clips have 4 reversals and more; 95 of 100 walking clips and all kicks have 3 at most.
    return m.dribble_reversals(joints) >= 4
