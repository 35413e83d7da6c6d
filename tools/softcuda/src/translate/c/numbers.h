// Numbers: bits and values, conversions and directed rounding.
static inline float ptx_f32(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
static inline double ptx_f64(uint64_t b) { double f; memcpy(&f, &b, 8); return f; }
static inline uint32_t ptx_bits32(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
static inline uint64_t ptx_bits64(double f) { uint64_t b; memcpy(&b, &f, 8); return b; }
static inline float ptx_f16(uint16_t b) { _Float16 f; memcpy(&f, &b, 2); return (float)f; }
static inline uint16_t ptx_to_f16(double v) { _Float16 f = (_Float16)v; uint16_t b; memcpy(&b, &f, 2); return isnan(v) ? 0x7fff : b; }
static inline float ptx_bf16(uint16_t b) { return ptx_f32((uint32_t)b << 16); }
static inline uint16_t ptx_to_bf16(double v) {
    float f = (float)v;
    uint32_t b = ptx_bits32(f);
    if (isnan(f)) return 0x7fff;
    // Odd where it is not exact, so that the second rounding does not see a tie that is none.
    if ((double)f != v && !isinf(f)) b = (b - (fabs((double)f) > fabs(v))) | 1;
    return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
static inline float ptx_ftz(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0, v) : v; }
static inline float ptx_sat(float v) { return isnan(v) ? 0 : v < 0 ? 0 : v > 1 ? 1 : v; }
static inline float ptx_relu(float v) { return isnan(v) ? v : v < 0 ? 0 : v; }
static inline uint32_t ptx_tf32(uint32_t b) { return (b & 0x7f800000) == 0x7f800000 ? b : (b + 0x1000) & ~0x1fffu; }
static inline uint32_t ptx_tf32_even(uint32_t b) { return (b & 0x7f800000) == 0x7f800000 ? b : (b + 0xfff + (b >> 13 & 1)) & ~0x1fffu; }
static inline double ptx_fma16(double a, double b, double c) { return a * b + c; }

// Modes as in the control register of SSE.
enum { PTX_RN, PTX_RM, PTX_RP, PTX_RZ };
#define PTX_DIRECTED(name, type, expression) \
    static __attribute__((noinline, unused)) type name(int mode, type a, type b, type c) { \
        volatile type x = a, y = b, z = c; \
        unsigned old = _mm_getcsr(); \
        _mm_setcsr((old & ~0x6000u) | mode << 13); \
        volatile type r = expression; \
        (void)z; \
        _mm_setcsr(old); \
        return r; \
    }
PTX_DIRECTED(ptx_add_f32, float, x + y)
PTX_DIRECTED(ptx_sub_f32, float, x - y)
PTX_DIRECTED(ptx_mul_f32, float, x * y)
PTX_DIRECTED(ptx_div_f32, float, x / y)
PTX_DIRECTED(ptx_fma_f32, float, fmaf(x, y, z))
PTX_DIRECTED(ptx_sqrt_f32, float, ((void)y, _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)))))
PTX_DIRECTED(ptx_add_f64, double, x + y)
PTX_DIRECTED(ptx_sub_f64, double, x - y)
PTX_DIRECTED(ptx_mul_f64, double, x * y)
PTX_DIRECTED(ptx_div_f64, double, x / y)
PTX_DIRECTED(ptx_fma_f64, double, fma(x, y, z))
PTX_DIRECTED(ptx_sqrt_f64, double, ((void)y, _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(x)))))

// To a narrower type by direction: the nearest, and one step from it where that is on the wrong side.
#define PTX_NARROW(name, bits_t, nearest, value, step) \
    static inline bits_t name(int mode, long double v) { \
        bits_t b = nearest; \
        long double back = value; \
        if (isnan(v) || mode == PTX_RN || back == v) return b; \
        int above = back > v, negative = b >> (8 * sizeof b - 1) & 1; \
        int down = mode == PTX_RM || (mode == PTX_RZ && v > 0); \
        if (down == above) { \
            if ((b & step) == 0) return negative == down ? b + 1 : (bits_t)((down ? (bits_t)1 << (8 * sizeof b - 1) : 0) | 1); \
            return down == negative ? b + 1 : b - 1; \
        } \
        return b; \
    }
PTX_NARROW(ptx_narrow_f16, uint16_t, ptx_to_f16((double)v), ptx_f16(b), 0x7fff)
PTX_NARROW(ptx_narrow_bf16, uint16_t, ptx_to_bf16((double)v), ptx_bf16(b), 0x7fff)
PTX_NARROW(ptx_narrow_f32, uint32_t, ptx_bits32((float)v), ptx_f32(b), 0x7fffffff)
PTX_NARROW(ptx_narrow_f64, uint64_t, ptx_bits64((double)v), ptx_f64(b), 0x7fffffffffffffff)

#define PTX_FROM_FLOAT(ty, c, lo, hi) \
    static inline c ptx_to_##ty(double v) { return isnan(v) ? 0 : v <= (double)(lo) ? (lo) : v >= (double)(hi) ? (hi) : (c)v; } \
    static inline c ptx_clamp_##ty(__int128 v) { return v < (__int128)(lo) ? (lo) : v > (__int128)(hi) ? (hi) : (c)v; }
PTX_FROM_FLOAT(s8, int8_t, INT8_MIN, INT8_MAX) PTX_FROM_FLOAT(u8, uint8_t, 0, UINT8_MAX)
PTX_FROM_FLOAT(s16, int16_t, INT16_MIN, INT16_MAX) PTX_FROM_FLOAT(u16, uint16_t, 0, UINT16_MAX)
PTX_FROM_FLOAT(s32, int32_t, INT32_MIN, INT32_MAX) PTX_FROM_FLOAT(u32, uint32_t, 0, UINT32_MAX)
PTX_FROM_FLOAT(s64, int64_t, INT64_MIN, INT64_MAX) PTX_FROM_FLOAT(u64, uint64_t, 0, UINT64_MAX)

static inline double ptx_min(double a, double b) { return isnan(a) ? b : isnan(b) ? a : a < b || (a == b && signbit(a)) ? a : b; }
static inline double ptx_max(double a, double b) { return isnan(a) ? b : isnan(b) ? a : a > b || (a == b && !signbit(a)) ? a : b; }
static inline double ptx_min_nan(double a, double b) { return isnan(a) || isnan(b) ? NAN : ptx_min(a, b); }
static inline double ptx_max_nan(double a, double b) { return isnan(a) || isnan(b) ? NAN : ptx_max(a, b); }
