// Elementary functions on F16. Included once per instruction set, after simd.h.

// eˣ to about 1.5 ulp: x = n·ln2 + r, |r| ≤ ln2/2, Taylor polynomial of degree 7 (error below 6e-9), times 2ⁿ.
// Arguments are clamped to [-87, 88]: e⁻⁸⁷ is the smallest result, e⁸⁸ the largest. NaN stays NaN.
QC_INLINE F16 exponential(F16 x) {
  x = maximum(set1(-87.0f), minimum(set1(88.0f), x));
  F16 n = nearest(x * set1(1.44269504088896341f));
  F16 r = fma(n, set1(-0.693145751953125f), x);   // ln2 = 0x1.62e4p-1 (exact times n) …
  r = fma(n, set1(-1.42860682030941723e-6f), r);  // … + the rest
  F16 p = set1(1.98412698e-4f);
  p = fma(p, r, set1(1.38888889e-3f));
  p = fma(p, r, set1(8.33333333e-3f));
  p = fma(p, r, set1(4.16666667e-2f));
  p = fma(p, r, set1(1.66666667e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// x / (1 + e⁻ˣ).
QC_INLINE F16 silu(F16 x) { return x / (set1(1.0f) + exponential(set1(0.0f) - x)); }

// tanh: an odd polynomial below 0.625 (Cephes tanhf), 1 - 2/(e²ˣ + 1) above.
QC_INLINE F16 hyperbolic_tangent(F16 x) {
  F16 z = x * x;
  F16 p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  F16 small = fma(p * z, x, x);
  F16 large = set1(1.0f) - set1(2.0f) / (exponential(x + x) + set1(1.0f));
  return where_less(absolute(x), set1(0.625f), small, large);
}

// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), transformers' gelu_pytorch_tanh.
QC_INLINE F16 gelu_tanh(F16 x) {
  F16 inner = set1(0.79788456080286536f) * fma(set1(0.044715f) * x * x, x, x);
  return set1(0.5f) * x * (set1(1.0f) + hyperbolic_tangent(inner));
}
