"""Operations that take each value by itself: they keep the axes of a value apart."""

# Of several operands of one shape, or of a shape and scalars, to a result of it.
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "cbrt ceil clamp convert_element_type copy copy_p cos cosh digamma div eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log "
    "log1p logistic lt max min mul ne neg nextafter not or pow real reduce_precision "
    "rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor".split()
)
