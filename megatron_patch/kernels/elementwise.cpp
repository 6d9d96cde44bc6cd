// What stands between the matrix products of a decoder layer, each in one pass over memory; see __init__.py.
//
// Every function exists twice, as NAME_fp32 and NAME_bf16.

#include "common.h"

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// ---------------------------------------------------------------- RMSNorm

template <typename T>
void rms_norm(Index rows, Index width, const T *x, const T *weight, float eps, T *y, float *scales) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (Index row = 0; row < rows; ++row) {
        const T *in = x + row * width;
        T *out = y + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (Index i = 0; i < width; ++i) squares += read(in[i]) * read(in[i]);
        const float scale = 1.0f / std::sqrt(squares / width + eps);
        scales[row] = scale;
#pragma omp simd
        for (Index i = 0; i < width; ++i) write(out[i], read(in[i]) * scale * read(weight[i]));
    }
}

// dx_i = s g_i w_i - s^3 x_i / H * sum_j g_j w_j x_j; dw_i = sum over rows of s g_i x_i.  dx or dw may be null.
template <typename T>
void rms_norm_backward(Index rows, Index width, const T *x, const T *weight, const float *scales, const T *gradient,
                       T *dx, T *dw) {
    const int most = dw ? omp_get_max_threads() : 1;
    std::vector<float> sums(dw ? most * width : 0);  // each thread's, added in the threads' order
#pragma omp parallel if (rows * width > PARALLEL)
    {
        float *sum = dw ? sums.data() + omp_get_thread_num() * width : nullptr;
#pragma omp for schedule(static)
        for (Index row = 0; row < rows; ++row) {
            const T *in = x + row * width;
            const T *g = gradient + row * width;
            const float scale = scales[row];
            if (dx) {
                T *out = dx + row * width;
                float along = 0;
#pragma omp simd reduction(+ : along)
                for (Index i = 0; i < width; ++i) along += read(g[i]) * read(weight[i]) * read(in[i]);
                along *= -scale * scale * scale / width;
#pragma omp simd
                for (Index i = 0; i < width; ++i)
                    write(out[i], read(g[i]) * read(weight[i]) * scale + read(in[i]) * along);
            }
            if (sum) {
#pragma omp simd
                for (Index i = 0; i < width; ++i) sum[i] += read(g[i]) * read(in[i]) * scale;
            }
        }
    }
    if (!dw) return;
    for (int thread = 1; thread < most; ++thread)
        for (Index i = 0; i < width; ++i) sums[i] += sums[thread * width + i];
    for (Index i = 0; i < width; ++i) write(dw[i], sums[i]);
}

// ---------------------------------------------------------------- SwiGLU

template <typename T>
void swiglu(Index rows, Index width, const T *gate_and_up, T *y) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (Index row = 0; row < rows; ++row) {
        const T *gate = gate_and_up + 2 * row * width;
        const T *up = gate + width;
        T *out = y + row * width;
#pragma omp simd
        for (Index i = 0; i < width; ++i) write(out[i], read(gate[i]) * sigmoid(read(gate[i])) * read(up[i]));
    }
}

// of up: g silu(gate); of gate: g up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
template <typename T>
void swiglu_backward(Index rows, Index width, const T *gate_and_up, const T *gradient, T *found) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (Index row = 0; row < rows; ++row) {
        const T *gate = gate_and_up + 2 * row * width;
        const T *up = gate + width;
        const T *g = gradient + row * width;
        T *of_gate = found + 2 * row * width;
        T *of_up = of_gate + width;
#pragma omp simd
        for (Index i = 0; i < width; ++i) {
            const float x = read(gate[i]), s = sigmoid(x), along = read(g[i]) * s;
            write(of_gate[i], along * read(up[i]) * (1 + x * (1 - s)));
            write(of_up[i], along * x);
        }
    }
}

// ---------------------------------------------------------------- heads: [S, B, heads, d], strides in elements

// Rotary positions.
template <typename T>
void rotate(Index places, Index records, Index heads, Index width, const T *states, Strides strides, const T *cosine,
            const T *sine, float direction, T *found) {
    const Index half = width / 2;
#pragma omp parallel for collapse(2) schedule(static) if (places * records * heads * width > PARALLEL)
    for (Index place = 0; place < places; ++place)
        for (Index record = 0; record < records; ++record) {
            const T *c = cosine + place * half;
            const T *s = sine + place * half;
            for (Index head = 0; head < heads; ++head) {
                const T *in = states + place * strides.place + record * strides.record + head * strides.head;
                T *out = found + ((place * records + record) * heads + head) * width;
                turn_halves(half, in, c, s, direction, out);
            }
        }
}

// ---------------------------------------------------------------- logits [rows, width], of which `real` are tokens

template <typename T>
void row_largest(Index rows, Index width, Index real, const T *logits, float *largest) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (Index row = 0; row < rows; ++row) {
        const T *in = logits + row * width;
        float found = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : found)
        for (Index i = 0; i < real; ++i) found = std::max(found, read(in[i]));
        largest[row] = found;
    }
}

// e^(logit - largest) in place, 0 where no token is, and each row's sum of what was not rounded yet
template <typename T>
void exponentials(Index rows, Index width, Index real, T *logits, const float *largest, float *sums) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (Index row = 0; row < rows; ++row) {
        T *in = logits + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Index i = 0; i < real; ++i) {
            const float found = exponential(read(in[i]) - largest[row]);
            sum += found;
            write(in[i], found);
        }
        std::fill(in + real, in + width, T{});
        sums[row] = sum;
    }
}

// ---------------------------------------------------------------- gradients

template <typename T> void add(Index count, float *total, const T *addend) {
#pragma omp parallel for simd schedule(static) if (count > PARALLEL)
    for (Index i = 0; i < count; ++i) total[i] += read(addend[i]);
}

// the sum of the squares of every `part` elements: the same whatever the number of threads
template <typename T> void squares(Index count, Index part, const T *x, float *sums) {
#pragma omp parallel for schedule(static) if (count > PARALLEL)
    for (Index begin = 0; begin < count; begin += part) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Index i = begin; i < std::min(count, begin + part); ++i) sum += read(x[i]) * read(x[i]);
        sums[begin / part] = sum;
    }
}

// ---------------------------------------------------------------- AdamW, with weights of the model in T

// new1, new2: 1 - beta, which in 32 bits would be off by 1e-5 for 0.999
template <typename T>
void adamw(Index count, float *weight, const float *gradient, float *mean, float *square, T *rounded, float factor,
           float rate, float kept, float new1, float beta2, float new2, float correction, float eps) {
#pragma omp parallel for simd schedule(static) if (count > PARALLEL)
    for (Index i = 0; i < count; ++i) {
        const float scaled = gradient[i] * factor;
        mean[i] += (scaled - mean[i]) * new1;
        square[i] = square[i] * beta2 + scaled * scaled * new2;
        weight[i] = weight[i] * kept - rate * mean[i] / (std::sqrt(square[i]) * correction + eps);
        if constexpr (!std::is_same_v<T, float>) write(rounded[i], weight[i]);
    }
}

}  // namespace

#define BOTH(T, SUFFIX)                                                                                               \
    extern "C" void rms_norm##SUFFIX(Index rows, Index width, const T *x, const T *weight, float eps, T *y,            \
                                     float *scales) {                                                                 \
        rms_norm(rows, width, x, weight, eps, y, scales);                                                             \
    }                                                                                                                 \
    extern "C" void rms_norm_backward##SUFFIX(Index rows, Index width, const T *x, const T *weight,                    \
                                              const float *scales, const T *gradient, T *dx, T *dw) {                 \
        rms_norm_backward(rows, width, x, weight, scales, gradient, dx, dw);                                          \
    }                                                                                                                 \
    extern "C" void swiglu##SUFFIX(Index rows, Index width, const T *gate_and_up, T *y) {                             \
        swiglu(rows, width, gate_and_up, y);                                                                          \
    }                                                                                                                 \
    extern "C" void swiglu_backward##SUFFIX(Index rows, Index width, const T *gate_and_up, const T *gradient,          \
                                            T *found) {                                                               \
        swiglu_backward(rows, width, gate_and_up, gradient, found);                                                   \
    }                                                                                                                 \
    extern "C" void rotate##SUFFIX(Index places, Index records, Index heads, Index width, const T *states,             \
                                   Index by_place, Index by_record, Index by_head, const T *cosine, const T *sine,     \
                                   float direction, T *found) {                                                       \
        rotate(places, records, heads, width, states, {by_place, by_record, by_head}, cosine, sine, direction, found); \
    }                                                                                                                 \
    extern "C" void row_largest##SUFFIX(Index rows, Index width, Index real, const T *logits, float *largest) {        \
        row_largest(rows, width, real, logits, largest);                                                              \
    }                                                                                                                 \
    extern "C" void exponentials##SUFFIX(Index rows, Index width, Index real, T *logits, const float *largest,         \
                                         float *sums) {                                                               \
        exponentials(rows, width, real, logits, largest, sums);                                                       \
    }                                                                                                                 \
    extern "C" void add##SUFFIX(Index count, float *total, const T *addend) { add(count, total, addend); }            \
    extern "C" void squares##SUFFIX(Index count, Index part, const T *x, float *sums) {                               \
        squares(count, part, x, sums);                                                                                \
    }                                                                                                                 \
    extern "C" void adamw##SUFFIX(Index count, float *weight, const float *gradient, float *mean, float *square,       \
                                  T *rounded, float factor, float rate, float kept, float new1, float beta2,           \
                                  float new2, float correction, float eps) {                                          \
        adamw(count, weight, gradient, mean, square, rounded, factor, rate, kept, new1, beta2, new2, correction, eps); \
    }

BOTH(float, _fp32)
BOTH(bfloat16, _bf16)
