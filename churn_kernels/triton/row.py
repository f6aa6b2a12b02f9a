"""The scalars of one row; the twin of csrc/rows/row.h, in the dtype of the row's record.

Values are scalars, or vectors of rows. `S` is the kernel's `spec.Spec`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from churn_kernels.triton.math import log1p_nonneg, log_pos


class UniformSums(NamedTuple):
    """What SKL to uniform takes besides, over all classes or the k largest; entries of students."""

    live: tl.tuple  # classes that are not at -inf
    spread: tl.tuple  # sum d, times S.distance
    excess: tl.tuple  # sum (exp(d) - 1) d, times S.distance
    lift: tl.tuple  # sum exp(d) - 1


class PairSums(NamedTuple):
    """Sums of each pair of models, see csrc/rows/divergence.h.

    KL to the teachers comes ready-made in `first`. Of symmetric KL first and second are times
    S.distance.
    """

    first: tl.tuple
    second: tl.tuple
    gap: tl.tuple
    other: tl.tuple  # sum f_j D of symmetric KL
    reach: tl.tuple  # inf where a class is at -inf in one of the two only


class Sums(NamedTuple):
    """What a row comes down to. Tuples of one entry a model or student; () where no option asks.

    d = logit - maximum over the classes that are not at -inf, f = exp(d / T).
    """

    maximum: tl.tuple
    mass: tl.tuple  # sum exp(d)
    moment: tl.tuple  # sum exp(d) d
    flat: UniformSums
    tempered_mass: tl.tuple  # sum f
    top_mass: tl.tuple  # mass, moment and UniformSums over the k largest
    top_moment: tl.tuple
    top_flat: UniformSums
    weighted_spread: tl.tuple  # sum class_weight d, times S.distance
    weight_live: tl.tuple  # sum class_weight over the classes not at -inf, times S.distance
    lost: tl.tuple  # classes at -inf whose weight is not 0
    pair: PairSums
    tail: tl.tuple  # exact mode: mass - 1, with more digits than the mass has
    top_tail: tl.tuple  # top_mass - 1


class Coefficients(NamedTuple):
    """What the gradient sweep multiplies into each class, see csrc/rows/row.h.

    Without a temperature f = e, and what belongs to f_i has joined constant.
    """

    constant: tl.tuple
    slope: tl.tuple
    uniform: tl.tuple
    top_constant: tl.tuple
    top_slope: tl.tuple
    top_uniform: tl.tuple
    smoothing: tl.tuple
    target: tl.tuple
    tempered_constant: tl.tuple
    slopes: tl.tuple  # students x models, of what a partner adds
    means: tl.tuple
    others: tl.tuple
    shares: tl.tuple  # pairs


class RowState(NamedTuple):
    """All that the gradient sweep has to know of a row."""

    maximum: tl.tuple
    found: Coefficients
    thresholds: tl.tuple  # of each student's top k
    last_ties: tl.tuple
    levels: tl.tuple  # of L1's pairs: p_i > p_j where d_i - d_j is above


@triton.jit
def kept(weight, x):
    """x, or 0 where its weight is 0: what has no weight cannot make a NaN."""
    return tl.where(weight != 0, x, 0.0)


@triton.jit
def full(x, S: tl.constexpr):
    """A mean out of sums that are times S.distance."""
    return x * (1.0 / S.distance)


@triton.jit
def log_mass(sums, k: tl.constexpr, S: tl.constexpr):
    if S.exact:
        return log1p_nonneg(sums.tail[k])
    else:
        return log_pos(sums.mass[k])


@triton.jit
def log_top_mass(sums, k: tl.constexpr, S: tl.constexpr):
    if S.exact:
        return log1p_nonneg(sums.top_tail[k])
    else:
        return log_pos(sums.top_mass[k])


@triton.jit
def entropy(sums, k: tl.constexpr, S: tl.constexpr):
    return log_mass(sums, k, S) - sums.moment[k] / sums.mass[k]


@triton.jit
def cross_entropy(
    sums,
    k: tl.constexpr,
    d_target,
    target_weight,
    total_weight,
    smoothing,
    classes,
    S: tl.constexpr,
):
    """(1 - eps) w_y (lse - z_y) + eps / C sum_c w_c (lse - z_c), as torch's cross_entropy.

    But a class of weight 0 adds 0 even where its logit is -inf.
    """
    lse = log_mass(sums, k, S)  # relative to the maximum
    value = tl.where(target_weight == 0, 0.0, target_weight * (lse - d_target))
    if S.smooths:
        soft = full((total_weight * lse * S.distance - sums.weighted_spread[k]) / classes, S)
        value = kept(1.0 - smoothing, (1.0 - smoothing) * value) + smoothing * soft
        value = tl.where(sums.lost[k] > 0, float("inf"), value)
    return tl.where(sums.mass[k] == sums.mass[k], value, float("nan"))


@triton.jit
def uniform_skl(mass, moment, flat, k: tl.constexpr, S: tl.constexpr):
    """SKL(p, U) = E_p d - mean d of n classes.

    Where the classes weigh much the same, both are nearly the same number; then
    sum (exp(d) - mass / n) d is the better way to write it.
    """
    n = flat.live[k]
    near = full((flat.excess[k] - flat.lift[k] / n * flat.spread[k]) / mass, S)
    return tl.where(mass > 0.5 * n, near, moment / mass - full(flat.spread[k] / n, S))


@triton.jit
def regularizer(sums, k: tl.constexpr, S: tl.constexpr):
    """H(p), or minus SKL(p, U): over all classes, or over the k largest."""
    mass, moment = sums.mass[k], sums.moment[k]
    if not S.top:
        if S.entropic:
            value = entropy(sums, k, S)
        else:
            value = -uniform_skl(mass, moment, sums.flat, k, S)
    elif S.renormalize:
        if S.entropic:
            value = log_top_mass(sums, k, S) - sums.top_moment[k] / sums.top_mass[k]
        else:
            value = -uniform_skl(sums.top_mass[k], sums.top_moment[k], sums.top_flat, k, S)
    elif S.entropic:
        value = (log_mass(sums, k, S) * sums.top_mass[k] - sums.top_moment[k]) / mass
    else:
        live, top = sums.flat.live[k].to(tl.float64), sums.top_flat
        shift = log_pos(live, S.exact) - log_mass(sums, k, S)
        if not S.exact:  # float32 has too few digits of a mass that is nearly `live`
            near = -log_pos(1.0 + sums.flat.lift[k].to(tl.float64) / live)
            shift = tl.where(mass > 0.5 * live, near, shift)
        spread = top.spread[k] + top.live[k] * shift * S.distance
        excess = top.excess[k] + shift * top.lift[k] * S.distance
        near = full((sums.flat.lift[k] / live * spread - excess) / mass, S)  # as in uniform_skl
        far = full(spread / live, S) - (sums.top_moment[k] + shift * sums.top_mass[k]) / mass
        value = tl.where(mass > 0.5 * live, near, far).to(S.scalar)
    return value


@triton.jit
def regularizer_gradient(sums, k: tl.constexpr, weight, S: tl.constexpr):
    """(constant, slope, uniform, top_constant, top_slope, top_uniform) of weight times R."""
    zero = weight * 0.0
    if S.top and not S.renormalize:
        # R = sum over the top k of r(log p), so dR/dz = r' [in the top k] - p sum r'.
        #   entropy: r' = -p (log p + 1);  minus SKL: r' = -p (log p + log n + 1) + 1/n.
        mass = sums.mass[k]
        shift = 1.0 - log_pos(mass, S.exact)
        uniform = zero
        if not S.entropic:
            shift += log_pos(sums.flat.live[k], S.exact)
            uniform = 1.0 / sums.flat.live[k]
        total = -(sums.top_moment[k] + shift * sums.top_mass[k]) / mass
        if not S.entropic:
            total += uniform * sums.top_flat.live[k]
        found = (
            -weight * total / mass,
            zero,
            zero,
            -weight * shift / mass,
            -weight / mass,
            weight * uniform,
        )
    else:
        # dH/dz = -p (d - E_p d); d(-SKL)/dz = -p (d - E_p d) - p + 1/n, over the classes in play.
        mass = sums.top_mass[k] if S.top else sums.mass[k]
        mean = (sums.top_moment[k] if S.top else sums.moment[k]) / mass
        if S.entropic:
            constant = weight * mean / mass
            uniform = zero
        else:
            constant = weight * (mean - 1.0) / mass
            uniform = weight / (sums.top_flat.live[k] if S.top else sums.flat.live[k])
        slope = -weight / mass
        if S.top:
            found = (zero, zero, zero, constant, slope, uniform)
        else:
            found = (constant, slope, uniform, zero, zero, zero)
    return found


@triton.jit
def divergence(
    sums, i: tl.constexpr, j: tl.constexpr, p: tl.constexpr, temperature, S: tl.constexpr
):
    """Value of pair p = (i, j)'s divergence."""
    if S.divergence == 3:
        value = sums.pair.gap[p]
    elif S.divergence == 4:
        value = sums.pair.first[p]
    else:
        shared = sums.pair.first[p] * (sums.pair.gap[p] / sums.tempered_mass[i])
        value = full((sums.pair.second[p] - shared) / sums.tempered_mass[j], S) / temperature
    if S.divergence != 3:
        infinite = sums.pair.reach[p] == float("inf")
        if S.divergence == 4:  # a teacher's NaN stays
            infinite &= value == value
        value = tl.where(infinite, float("inf"), value)
    value = tl.where(value < 0, 0.0, value)  # rounding only; NaN stays
    broken = (sums.mass[i] != sums.mass[i]) | (sums.mass[j] != sums.mass[j])
    return tl.where(broken, float("nan"), value)


@triton.constexpr_function
def pair_index(i, j, models):
    """Place of (i, j), i < j, in (0, 1), (0, 2), .., (1, 2), .."""
    return (i * (2 * models - i - 1)) // 2 + j - i - 1


@triton.jit
def pair_weight(i: tl.constexpr, j: tl.constexpr, weights, S: tl.constexpr):
    """Weight of the divergence between student i and model j."""
    if S.divergence == 4:
        return weights[0] / (S.models - 1)
    elif i < j:
        return weights[pair_index(i, j, S.models)]
    else:
        return weights[pair_index(j, i, S.models)]


@triton.jit
def pair_mean(sums, i: tl.constexpr, j: tl.constexpr, S: tl.constexpr):
    """E_i[d_i - d_j] (E_i[sign] for L1) of the pair (i, j), seen from i."""
    p: tl.constexpr = pair_index(min(i, j), max(i, j), S.models)
    pair = sums.pair
    if i < j:
        total = pair.first[p]
    elif S.divergence == 3:
        total = -pair.second[p]
    else:
        total = -pair.other[p]
    mean = total / sums.tempered_mass[i]
    if S.divergence == 1:
        # Where the divergence is infinite its gradient has no value.
        mean = tl.where(pair.reach[p] == float("inf"), float("nan"), full(mean, S))
    return mean


@triton.jit
def pair_scalars(mass_i, mass_j, gap):
    """(shared, more_i, minus_more_j) of `divergence.probability_difference`.

    The larger of the two masses gives what they have in common.
    """
    more = gap / (mass_i * mass_j)
    shared = 1.0 / tl.where(mass_i < mass_j, mass_j, mass_i)
    return shared, tl.where(gap < 0, -more, 0.0), tl.where(gap < 0, 0.0, -more)


@triton.jit
def pair_levels(sums, temperature, S: tl.constexpr):
    """For each pair, where p_i > p_j: d_i - d_j is above this."""
    logs = ()
    for k in tl.static_range(S.models):
        logs += (log_pos(sums.tempered_mass[k], S.exact),)
    levels = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            levels += (temperature * (logs[i] - logs[j]),)
    return levels


@triton.jit
def pair_share(sums, i: tl.constexpr, j: tl.constexpr, weight, temperature, S: tl.constexpr):
    """What both models of a pair take of f_i - f_j, for symmetric KL."""
    mass_i, mass_j = sums.tempered_mass[i], sums.tempered_mass[j]
    shared, _, _ = pair_scalars(mass_i, mass_j, sums.pair.gap[pair_index(i, j, S.models)])
    return kept(weight, weight / temperature * shared)


@triton.jit
def divergence_gradient(
    sums, i: tl.constexpr, j: tl.constexpr, weight, temperature, S: tl.constexpr
):
    """(tempered_constant, slope, mean, other) that model j adds to model i's gradient."""
    w = weight / temperature
    mass_i, mass_j = sums.tempered_mass[i], sums.tempered_mass[j]
    zero = w * 0.0
    if S.divergence == 3 or S.divergence == 1:
        mean = pair_mean(sums, i, j, S)
        # Where it is the difference to the mean that counts, so do the digits that the sweep lacks.
        lacking = mean - mean.to(S.compute).to(S.scalar)
    if S.divergence == 3:
        slope = w / mass_i
        found = (-slope * lacking, slope, mean, zero)
    elif S.divergence == 1:
        gap = sums.pair.gap[pair_index(min(i, j), max(i, j), S.models)]
        _, more_i, minus_more_j = pair_scalars(mass_i, mass_j, gap if i < j else -gap)
        slope = w / (temperature * mass_i)
        found = (w * more_i - slope * lacking, slope, mean, zero - w * minus_more_j)
    else:
        found = (w / mass_i, zero, zero, w / mass_j)
    return (
        kept(weight, found[0]),
        kept(weight, found[1]),
        kept(weight, found[2]),
        kept(weight, found[3]),
    )


@triton.jit
def cast_each(values, dtype: tl.constexpr):
    cast = ()
    for i in tl.static_range(len(values)):
        cast += (values[i].to(dtype),)
    return cast


@triton.jit
def cast_coefficients(found, dtype: tl.constexpr):
    """The coefficients as the gradient sweep takes them."""
    return Coefficients(
        cast_each(found.constant, dtype),
        cast_each(found.slope, dtype),
        cast_each(found.uniform, dtype),
        cast_each(found.top_constant, dtype),
        cast_each(found.top_slope, dtype),
        cast_each(found.top_uniform, dtype),
        cast_each(found.smoothing, dtype),
        cast_each(found.target, dtype),
        cast_each(found.tempered_constant, dtype),
        cast_each(found.slopes, dtype),
        cast_each(found.means, dtype),
        cast_each(found.others, dtype),
        cast_each(found.shares, dtype),
    )


@triton.jit
def coefficients(
    sums,
    ce,  # weights of the terms: a tuple of students
    r,  # students
    d,  # pairs
    target_weight,
    total_weight,
    smoothing,
    classes,
    temperature,
    S: tl.constexpr,
):
    """The gradient's coefficients when the row's terms have these weights."""
    constant = ()
    slope = ()
    uniform = ()
    top_constant = ()
    top_slope = ()
    top_uniform = ()
    soft = ()
    hard = ()
    tempered_constant = ()
    slopes = ()
    means = ()
    shares = ()
    others = ()
    for i in tl.static_range(S.students):
        zero = sums.mass[i] * 0.0
        c, s, u, tc, ts, tu = zero, zero, zero, zero, zero, zero
        if S.r:
            c, s, u, tc, ts, tu = regularizer_gradient(sums, i, r[i], S)
            c, s, u = kept(r[i], c), kept(r[i], s), kept(r[i], u)
            tc, ts, tu = kept(r[i], tc), kept(r[i], ts), kept(r[i], tu)
        eps_w = zero
        one_w = zero
        if S.ce:
            # A weight that is 0 because it was divided by infinity counts.
            one_w = ce[i] * (1.0 - smoothing) * target_weight
            eps_w = ce[i] * smoothing / classes
            c += (one_w + eps_w * total_weight).to(S.scalar) / sums.mass[i]
        both = zero
        if S.d:
            for j in tl.static_range(S.models):
                added = (zero, zero, zero, zero)
                if j != i:
                    weight = pair_weight(i, j, d, S)
                    added = divergence_gradient(sums, i, j, weight, temperature, S)
                both += added[0]
                slopes += (added[1],)
                means += (added[2],)
                others += (added[3],)
                if S.divergence == 1 and i < j:
                    shares += (pair_share(sums, i, j, weight, temperature, S),)
        constant += (c if S.tempered else c + both,)
        slope += (s,)
        tempered_constant += (both,)
        uniform += (u,)
        top_constant += (tc,)
        top_slope += (ts,)
        top_uniform += (tu,)
        soft += (eps_w.to(S.scalar),)
        hard += (one_w.to(S.scalar),)
    return Coefficients(
        constant,
        slope,
        uniform,
        top_constant,
        top_slope,
        top_uniform,
        soft,
        hard,
        tempered_constant,
        slopes,
        means,
        others,
        shares,
    )
