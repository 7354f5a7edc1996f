// Solvers of the K x K problems that balancing methods pose, one source for host and device.
//
// All arithmetic is float64.  Matrices are [K, K] row by row; `scratch` holds solver_scratch(K)
// numbers.  No loop waits for a tolerance alone: each is bounded by a count, so that every input,
// NaN included, ends.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace superbert::solvers {

SUPERBERT_HOST_DEVICE int64_t solver_scratch(int64_t k) { return k * k + 5 * k; }

// ---- eigenvalues -------------------------------------------------------------------------------
// Eigenvalues (unsorted) and eigenvectors (columns of `vectors`) of a symmetric matrix by cyclic
// Jacobi rotations (Golub and Van Loan, Matrix Computations, section 8.5).  Destroys `matrix`.
SUPERBERT_HOST_DEVICE void symmetric_eigen(double* matrix, int64_t k, double* values,
                                           double* vectors) {
  constexpr int kSweeps = 30;
  for (int64_t i = 0; i < k * k; ++i) vectors[i] = i % (k + 1) == 0 ? 1.0 : 0.0;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p < k; ++p) {
      for (int64_t q = p + 1; q < k; ++q) {
        const double off = matrix[p * k + q];
        const double at_p = matrix[p * k + p], at_q = matrix[q * k + q];
        if (!(off * off > 1e-32 * std::fabs(at_p * at_q)) || off == 0.0) continue;
        rotated = true;
        const double tau = (at_q - at_p) / (2.0 * off);
        const double t = (tau >= 0.0 ? 1.0 : -1.0) / (std::fabs(tau) + std::sqrt(1.0 + tau * tau));
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = t * c;
        for (int64_t i = 0; i < k; ++i) {
          const double x = matrix[i * k + p], y = matrix[i * k + q];
          matrix[i * k + p] = c * x - s * y;
          matrix[i * k + q] = s * x + c * y;
        }
        for (int64_t i = 0; i < k; ++i) {
          const double x = matrix[p * k + i], y = matrix[q * k + i];
          matrix[p * k + i] = c * x - s * y;
          matrix[q * k + i] = s * x + c * y;
        }
        for (int64_t i = 0; i < k; ++i) {
          const double x = vectors[i * k + p], y = vectors[i * k + q];
          vectors[i * k + p] = c * x - s * y;
          vectors[i * k + q] = s * x + c * y;
        }
      }
    }
    if (!rotated) break;
  }
  for (int64_t i = 0; i < k; ++i) values[i] = matrix[i * k + i];
}

// ---- linear systems ----------------------------------------------------------------------------
// Solves H[P, P] x[P] = b[P] by Cholesky, where P are the indices with chosen[i] != 0; x is zero
// elsewhere.  `factor` has k * k numbers.
SUPERBERT_HOST_DEVICE void solve_chosen(const double* h, const double* b, const double* chosen,
                                        int64_t k, double* factor, double* x) {
  for (int64_t i = 0; i < k; ++i) {
    x[i] = 0.0;
    if (chosen[i] == 0.0) continue;
    for (int64_t j = 0; j <= i; ++j) {
      if (chosen[j] == 0.0) continue;
      double sum = h[i * k + j];
      for (int64_t m = 0; m < j; ++m) {
        if (chosen[m] != 0.0) sum -= factor[i * k + m] * factor[j * k + m];
      }
      // A row that depends on those before it leaves a pivot of rounding errors only.
      const double least = 1e-14 * h[i * k + i];
      factor[i * k + j] = i == j ? std::sqrt(sum > least ? sum : least) : sum / factor[j * k + j];
    }
    double sum = b[i];
    for (int64_t m = 0; m < i; ++m) {
      if (chosen[m] != 0.0) sum -= factor[i * k + m] * x[m];
    }
    x[i] = sum / factor[i * k + i];
  }
  for (int64_t i = k - 1; i >= 0; --i) {
    if (chosen[i] == 0.0) continue;
    double sum = x[i];
    for (int64_t m = i + 1; m < k; ++m) {
      if (chosen[m] != 0.0) sum -= factor[m * k + i] * x[m];
    }
    x[i] = sum / factor[i * k + i];
  }
}

// ---- quadratic programs ------------------------------------------------------------------------
// How fast b'x - x'Hx / 2 grows with x[i], in units of row i; zero where rounding errors explain
// it.
SUPERBERT_HOST_DEVICE double slope_along(const double* h, const double* b, const double* x,
                                         int64_t k, int64_t i) {
  double slope = b[i], size = std::fabs(b[i]);
  for (int64_t j = 0; j < k; ++j) {
    slope -= h[i * k + j] * x[j];
    size += std::fabs(h[i * k + j] * x[j]);
  }
  return slope > 1e-12 * size ? slope / std::sqrt(h[i * k + i]) : 0.0;
}

// Guesses which x are positive at the minimum by exchanging all that are on the wrong side at once
// (block pivoting: Júdice and Pires, Computers & Operations Research 1994).  Leaves in `chosen`
// those that were positive last.
SUPERBERT_HOST_DEVICE void guess_chosen(const double* h, const double* b, int64_t k, double* chosen,
                                        double* factor, double* trial) {
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    solve_chosen(h, b, chosen, k, factor, trial);
    bool exchanged = false;
    for (int64_t i = 0; i < k; ++i) {
      if (!(h[i * k + i] > 0.0)) continue;
      const bool enters = chosen[i] == 0.0 && slope_along(h, b, trial, k, i) > 0.0;
      const bool leaves = chosen[i] != 0.0 && !(trial[i] > 0.0);
      if (enters || leaves) chosen[i] = enters ? 1.0 : 0.0, exchanged = true;
    }
    if (!exchanged) return;
  }
}

// x >= 0 that minimizes x'Hx / 2 - b'x, H positive definite: the active set method of Lawson and
// Hanson, Solving Least Squares Problems, chapter 23.  Rows of H with a zero diagonal stay out.
// Of many rows it starts from a guess, instead of bringing them in one by one.
SUPERBERT_HOST_DEVICE void solve_nonnegative(const double* h, const double* b, int64_t k, double* x,
                                             double* scratch) {
  constexpr int64_t kOneByOne = 64;
  double *factor = scratch, *chosen = scratch + k * k, *trial = chosen + k;
  for (int64_t i = 0; i < k; ++i) x[i] = chosen[i] = 0.0;
  const bool guessed = k > kOneByOne;
  if (guessed) guess_chosen(h, b, k, chosen, factor, trial);
  for (int64_t round = 0; round < 3 * k; ++round) {
    int64_t enter = -1;
    double steepest = 0.0;
    for (int64_t i = 0; i < k; ++i) {
      if (chosen[i] != 0.0 || !(h[i * k + i] > 0.0)) continue;
      const double slope = slope_along(h, b, x, k, i);
      if (slope > steepest) enter = i, steepest = slope;
    }
    if (round > 0 || !guessed) {
      if (enter < 0) return;
      chosen[enter] = 1.0;
    }
    for (int64_t inner = 0; inner < k; ++inner) {
      solve_chosen(h, b, chosen, k, factor, trial);
      double length = 1.0; // of the way to the trial point before a bound is met
      int64_t leave = -1;
      for (int64_t i = 0; i < k; ++i) {
        if (chosen[i] == 0.0 || trial[i] > 0.0) continue;
        const double part = x[i] > 0.0 ? x[i] / (x[i] - trial[i]) : 0.0;
        if (leave < 0 || part < length) length = part, leave = i;
      }
      for (int64_t i = 0; i < k; ++i) x[i] += length * (trial[i] - x[i]);
      if (leave < 0) break;
      x[leave] = chosen[leave] = 0.0;
    }
  }
}

// ---- methods -----------------------------------------------------------------------------------
// The weights v >= lower of the point nearest the origin: J'v is the projection of J'lower onto the
// dual cone {d : Jd >= 0}.
SUPERBERT_HOST_DEVICE void project_onto_dual_cone(const double* gram, const double* lower,
                                                  int64_t k, double* v, double* scratch) {
  double* b = scratch + k * k + 2 * k;
  for (int64_t i = 0; i < k; ++i) {
    b[i] = 0.0;
    for (int64_t j = 0; j < k; ++j) b[i] -= gram[i * k + j] * lower[j];
  }
  solve_nonnegative(gram, b, k, v, scratch);
  for (int64_t i = 0; i < k; ++i) v[i] += lower[i];
}

// Minimizer of |J'w| over w >= 0, sum w = 1.  Where x minimizes x'Gx / 2 - 1'x, w is x / sum x.
SUPERBERT_HOST_DEVICE void solve_mgda(const double* gram, int64_t k, double* w, double* scratch) {
  double* ones = scratch + k * k + 2 * k;
  for (int64_t i = 0; i < k; ++i) ones[i] = 1.0;
  solve_nonnegative(gram, ones, k, w, scratch);
  double sum = 0.0;
  for (int64_t i = 0; i < k; ++i) sum += w[i];
  for (int64_t i = 0; i < k; ++i) w[i] = sum > 0.0 ? w[i] / sum : 1.0 / k;
}

// CAGrad: the d within c |g0| of the mean gradient g0 whose worst <g_i, d> is best.  Its weights
// are 1/K + y, where y >= 0 minimizes y'Gy / 2 + (G1/K - level)'y for the level at which |J'y| = c
// |g0|; |J'y| grows with the level, so bisection finds it.
SUPERBERT_HOST_DEVICE void solve_cagrad(const double* gram, double c, int64_t k, double* weights,
                                        double* scratch) {
  constexpr int kHalvings = 60;
  double *b = scratch + k * k + 2 * k, *with_mean = b + k;
  double mean_norm = 0.0;
  for (int64_t i = 0; i < k; ++i) {
    with_mean[i] = 0.0;
    for (int64_t j = 0; j < k; ++j) with_mean[i] += gram[i * k + j] / k;
    mean_norm += with_mean[i] / k;
  }
  mean_norm = std::sqrt(mean_norm > 0.0 ? mean_norm : 0.0);
  const double radius = c * mean_norm;
  double low = with_mean[0], high = with_mean[0] + radius * std::sqrt(gram[0]);
  for (int64_t i = 1; i < k; ++i) {
    const double best = with_mean[i] + radius * std::sqrt(gram[i * k + i]);
    low = with_mean[i] < low ? with_mean[i] : low;
    high = best < high ? best : high;
  }
  for (int halving = 0; halving < kHalvings; ++halving) {
    const double level = 0.5 * (low + high);
    for (int64_t i = 0; i < k; ++i) b[i] = level - with_mean[i];
    solve_nonnegative(gram, b, k, weights, scratch);
    double norm_squared = 0.0;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) norm_squared += weights[i] * gram[i * k + j] * weights[j];
    }
    if (norm_squared > radius * radius) {
      high = level;
    } else {
      low = level;
    }
  }
  for (int64_t i = 0; i < k; ++i) weights[i] += 1.0 / k;
}

// Newton's method for Gx = x^-power on the convex x'Gx / 2 - sum of utilities, from x on, in steps
// that keep x positive.  Returns whether x solves it, as far as rounding lets it.
SUPERBERT_HOST_DEVICE bool solve_fairgrad_from(const double* gram, double power, int64_t k,
                                               int steps, double* x, double* scratch) {
  double *hessian = scratch, *chosen = scratch + k * k, *slope = chosen + k, *step = slope + k;
  bool settled = false;
  for (int round = 0; round < steps; ++round) {
    // The Hessian is the Gram matrix with a larger diagonal; it is factored where it stands, so it
    // is written anew each time.
    double error = 0.0; // of all equations, relative to their terms
    for (int64_t i = 0; i < k; ++i) {
      slope[i] = 0.0;
      if (chosen[i] == 0.0) continue;
      double size = 0.0;
      for (int64_t j = 0; j < k; ++j) {
        hessian[i * k + j] = gram[i * k + j];
        slope[i] -= gram[i * k + j] * x[j];
        size += std::fabs(gram[i * k + j] * x[j]);
      }
      const double utility = std::pow(x[i], -power);
      slope[i] += utility;
      hessian[i * k + i] += power * utility / x[i];
      error += std::fabs(slope[i]) / (size + utility);
    }
    solve_chosen(hessian, slope, chosen, k, hessian, step);
    double largest = 0.0; // of |step / x|
    for (int64_t i = 0; i < k; ++i) {
      const double part = chosen[i] != 0.0 ? std::fabs(step[i] / x[i]) : 0.0;
      largest = part > largest ? part : largest;
    }
    const double length = largest > 0.5 ? 0.5 / largest : 1.0;
    bool finite = true;
    for (int64_t i = 0; i < k; ++i) {
      x[i] += length * step[i];
      finite = finite && x[i] - x[i] == 0.0;
    }
    if (!finite) return false;
    settled = error < k * (1e-13 + 1e-15 * power); // but for rounding
    if (!(largest > 1e-14)) break;
  }
  return settled;
}

// Of x that solves Gx = x^-power: `ahead`, about what solves it for the power `next`, along the
// tangent of log x in 1 / power.  Returns whether it is of any use.
SUPERBERT_HOST_DEVICE bool solve_fairgrad_ahead(const double* gram, double power, double next,
                                                int64_t k, const double* x, double* ahead,
                                                double* scratch) {
  constexpr double kFarthest = 300.0; // e^300 squared is still a number
  double *hessian = scratch, *chosen = scratch + k * k, *slope = chosen + k, *step = slope + k;
  for (int64_t i = 0; i < k; ++i) {
    if (chosen[i] == 0.0) continue;
    for (int64_t j = 0; j < k; ++j) hessian[i * k + j] = gram[i * k + j];
    const double utility = std::pow(x[i], -power);
    hessian[i * k + i] += power * utility / x[i];
    slope[i] = -power * std::log(x[i]) * utility;
  }
  solve_chosen(hessian, slope, chosen, k, hessian, step);
  for (int64_t i = 0; i < k; ++i) {
    const double move = chosen[i] != 0.0 ? step[i] / x[i] * (1.0 - power / next) : 0.0;
    if (!(std::fabs(move) < kFarthest)) return false;
    ahead[i] = x[i] * std::exp(move);
  }
  return true;
}

// Follows the x > 0 with Gx = x^-power from power 1 to `last` (Allgower and Georg, Introduction to
// Numerical Continuation Methods, chapter 2), in steps that are halved where they fail.
SUPERBERT_HOST_DEVICE void solve_fairgrad_on_path(const double* gram, double last, int64_t k,
                                                  double* x, double* scratch) {
  constexpr int kStages = 400, kSteps = 12;
  constexpr double kLargest = 0.75, kSmallest = 1e-6;
  double* ahead = scratch + k * k + 3 * k;
  double power = 1.0, part = 0.5; // of the way from 1 / power to zero
  for (int stage = 0; stage < kStages && power < last && part > kSmallest; ++stage) {
    const double next = power / (1.0 - part) < last ? power / (1.0 - part) : last;
    bool settled = false;
    if (solve_fairgrad_ahead(gram, power, next, k, x, ahead, scratch)) {
      for (int step = 0; step < kSteps && !settled; ++step) {
        settled = solve_fairgrad_from(gram, next, k, 1, ahead, scratch);
      }
    }
    part = !settled ? 0.5 * part : 2.0 * part < kLargest ? 2.0 * part : kLargest;
    if (!settled) continue;
    power = next;
    for (int64_t i = 0; i < k; ++i) x[i] = ahead[i];
  }
}

// x > 0 with Gx = x^(-1/alpha), element by element: alpha-fair utilities, alpha = 1 the Nash
// bargaining solution.  A zero gradient bargains for nothing: its weight is 0.
//
// For large powers 1 / alpha the utilities are like walls, over which Newton's method jumps unless
// it begins nearby.  From 1e8 on x is what it is in the limit, but for a millionth.
SUPERBERT_HOST_DEVICE void solve_fairgrad(const double* gram, double alpha, int64_t k, double* x,
                                          double* scratch) {
  constexpr int kSteps = 100;
  constexpr double kSmallest = 1e-8; // alpha
  const double last = 1.0 / (alpha > kSmallest ? alpha : kSmallest);
  double* chosen = scratch + k * k;
  for (int64_t i = 0; i < k; ++i) chosen[i] = gram[i * k + i] > 0.0 ? 1.0 : 0.0;
  const auto solve = [&](double power) {
    for (int64_t i = 0; i < k; ++i) {
      // The solution if all gradients were orthogonal.
      x[i] = chosen[i] != 0.0 ? std::pow(gram[i * k + i], -1.0 / (1.0 + power)) : 0.0;
    }
    return solve_fairgrad_from(gram, power, k, kSteps, x, scratch);
  };
  if (solve(last) || last <= 1.0) return;
  solve(1.0);
  solve_fairgrad_on_path(gram, last, k, x, scratch);
}

} // namespace superbert::solvers
