"""The scalars of one row; the twin of csrc/rows/row.h, in the dtype of the row's record.

Values are scalars, or vectors of rows. `S` is the kernel's `spec.Spec`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from churn_kernels.triton.math import log1p_nonneg, log_pos


class Sums(NamedTuple):
    """What a row comes down to. Tuples of one entry a model or pair; () where no option asks.

    d = logit - maximum over the classes that are not at -inf, f = exp(d / T).
    """

    maximum: tl.tuple
    mass: tl.tuple  # sum exp(d)
    moment: tl.tuple  # sum exp(d) d
    spread: tl.tuple  # sum d
    live: tl.tuple  # classes not at -inf
    tempered_mass: tl.tuple  # sum exp(d / T)
    top_mass: tl.tuple  # mass, moment, spread and live over the k largest
    top_moment: tl.tuple
    top_spread: tl.tuple
    top_live: tl.tuple
    weighted_spread: tl.tuple  # sum class_weight d
    weight_live: tl.tuple  # sum class_weight over the classes not at -inf
    first: tl.tuple  # pairs: see divergence() below
    second: tl.tuple
    reach: tl.tuple  # largest |d_i - d_j|; inf where a class is at -inf in one of the two only
    tail: tl.tuple  # exact mode: mass - 1, with more digits than the mass has
    top_tail: tl.tuple  # top_mass - 1


class Coefficients(NamedTuple):
    """What the gradient sweep multiplies into each class, see csrc/rows/row.h.

    Without a temperature f = e, and what belongs to f_i and f_i d_i has joined constant and slope.
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
    slopes: tl.tuple  # students x models
    others: tl.tuple  # students x models


class RowState(NamedTuple):
    """All that the gradient sweep has to know of a row."""

    maximum: tl.tuple
    found: Coefficients
    thresholds: tl.tuple  # of each student's top k
    last_ties: tl.tuple
    inverse_masses: tl.tuple  # what makes exponentials probabilities, for L1


@triton.jit
def kept(weight, x):
    """x, or 0 where its weight is 0: what has no weight cannot make a NaN."""
    return tl.where(weight != 0, x, 0.0)


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
    """(1 - eps) w_y (lse - z_y) + eps / C sum_c w_c (lse - z_c), as torch's cross_entropy."""
    lse = log_mass(sums, k, S)  # relative to the maximum
    hard = target_weight * (lse - d_target)
    if S.smooths:
        soft = (total_weight * lse - sums.weighted_spread[k]) / classes
        smooth = kept(1.0 - smoothing, (1.0 - smoothing) * hard) + smoothing * soft
        dead = (sums.live[k] < classes) & (sums.mass[k] == sums.mass[k])
        return tl.where(dead, float("inf"), smooth)
    else:
        return hard


@triton.jit
def regularizer(sums, k: tl.constexpr, S: tl.constexpr):
    """H(p), or minus SKL(p, U): over all classes, or over the k largest."""
    mass, moment = sums.mass[k], sums.moment[k]
    if not S.top:
        if S.entropic:
            value = entropy(sums, k, S)
        else:
            value = sums.spread[k] / sums.live[k] - moment / mass
    elif S.renormalize:
        mean = sums.top_moment[k] / sums.top_mass[k]
        if S.entropic:
            value = log_top_mass(sums, k, S) - mean
        else:
            value = sums.top_spread[k] / sums.top_live[k] - mean
    elif S.entropic:
        value = (log_mass(sums, k, S) * sums.top_mass[k] - sums.top_moment[k]) / mass
    else:
        shift = log_pos(sums.live[k], S.exact) - log_mass(sums, k, S)
        value = (sums.top_spread[k] + sums.top_live[k] * shift) / sums.live[k]
        value -= (sums.top_moment[k] + shift * sums.top_mass[k]) / mass
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
            shift += log_pos(sums.live[k], S.exact)
            uniform = 1.0 / sums.live[k]
        total = -(sums.top_moment[k] + shift * sums.top_mass[k]) / mass
        if not S.entropic:
            total += uniform * sums.top_live[k]
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
            uniform = weight / (sums.top_live[k] if S.top else sums.live[k])
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
    """Value of pair p = (i, j)'s divergence.

    Symmetric KL: the two log masses cancel, D = d_i - d_j, SKL = (sum f_i D / mass_i - sum f_j D /
    mass_j) / T. L1: first = sum of s p_i, second = sum of s p_j. KL to the teachers comes
    ready-made in `first`.
    """
    if S.divergence == 3:
        value = sums.first[p] - sums.second[p]
        reach = value * 0.0
    elif S.divergence == 4:
        value = sums.first[p]
        reach = sums.reach[p]
    else:
        value = sums.first[p] / sums.tempered_mass[i] - sums.second[p] / sums.tempered_mass[j]
        value /= temperature
        reach = sums.reach[p]
    broken = (sums.mass[i] != sums.mass[i]) | (sums.mass[j] != sums.mass[j])
    value = tl.where((reach == float("inf")) & (broken == 0), float("inf"), value)
    return tl.where(value < 0, 0.0, value)  # rounding only; NaN stays


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
def pair_mean(sums, i: tl.constexpr, j: tl.constexpr, temperature, S: tl.constexpr):
    """E_i[D] (E_i[sign] for L1) of the pair (i, j), seen from i."""
    if i < j:
        mean = sums.first[pair_index(i, j, S.models)]
    else:
        mean = -sums.second[pair_index(j, i, S.models)]
    if S.divergence == 1:  # L1 sums are means already
        mean = mean / (sums.tempered_mass[i] * temperature)
        # Where the divergence is infinite its gradient has no value.
        reach = sums.reach[pair_index(min(i, j), max(i, j), S.models)]
        mean = tl.where(reach == float("inf"), float("nan"), mean)
    return mean


@triton.jit
def divergence_gradient(
    sums, i: tl.constexpr, j: tl.constexpr, weight, temperature, S: tl.constexpr
):
    """(tempered_constant, slope_i, slope_j, other_j) that model j adds to model i's gradient."""
    w = weight / temperature
    mass_i, mass_j = sums.tempered_mass[i], sums.tempered_mass[j]
    zero = w * 0.0
    if S.divergence == 3:
        found = (-w * pair_mean(sums, i, j, temperature, S) / mass_i, zero, w / mass_i, zero)
    elif S.divergence == 1:
        slope = w / (temperature * mass_i)
        constant = (w - w * pair_mean(sums, i, j, temperature, S)) / mass_i
        found = (constant, slope, -slope, w / mass_j)
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
        cast_each(found.others, dtype),
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
            one_w = ce[i] * (1.0 - smoothing) * target_weight
            eps_w = ce[i] * smoothing / classes
            c += kept(ce[i], (one_w + eps_w * total_weight) / sums.mass[i])
        both = zero
        own = zero
        crosses = ()
        if S.d:
            for j in tl.static_range(S.models):
                if j == i:
                    crosses += (zero,)
                    others += (zero,)
                else:
                    weight = pair_weight(i, j, d, S)
                    added = divergence_gradient(sums, i, j, weight, temperature, S)
                    both += added[0]
                    own += added[1]
                    crosses += (added[2],)
                    others += (added[3],)
            for j in tl.static_range(S.models):
                if j == i:
                    slopes += (own,)
                else:
                    slopes += (crosses[j],)
        constant += (c if S.tempered else c + both,)
        slope += (s if S.tempered else s + own,)
        tempered_constant += (both,)
        uniform += (u,)
        top_constant += (tc,)
        top_slope += (ts,)
        top_uniform += (tu,)
        soft += (eps_w,)
        hard += (one_w,)
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
        others,
    )
