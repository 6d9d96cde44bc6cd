// Attention of short records on a CPU: each record and group of heads by itself, in buffers that stay in the cache.
//
// q [S, B, groups, heads of a group, d], k and v [S, B, groups, d], as float (NAME_fp32) or bfloat16 (NAME_bf16); all is
// computed in 32 bits.  In a packed row (B = 1) records of any length lie behind each other.  What a token may not see
// is not computed.  The weights [S, S] and the turned queries and keys are computed again in the backward pass, the
// weights from the logarithm of each row's sum.

#include "common.h"

namespace {

// 16 floats: one register with AVX-512, two with AVX2, four with NEON; the compiler splits it.
typedef float Lane __attribute__((vector_size(64), aligned(4), may_alias));
constexpr Index LANE = 16;
constexpr Index TILE = 6;  // rows whose sums stay in registers: 12 of AVX2's 16
#ifdef __AVX512F__
constexpr int BESIDE = 2;  // registers of a row: 12 of 32, so that no sum waits for its own last addition
#else
constexpr int BESIDE = 1;
#endif

inline Index whole_lanes(Index width) { return (width + LANE - 1) / LANE * LANE; }

// c [ROWS, 16 LANES] += a b, with a(i, k) = a[i * by_row + k * by_depth] and b [depth, 16 LANES] in rows of `b_width`.
template <int ROWS, int LANES>
inline void add_tile(Index depth, const float *a, Index by_row, Index by_depth, const float *b, Index b_width, float *c,
                     Index c_width) {
    Lane sums[ROWS][LANES];
    for (int row = 0; row < ROWS; ++row)
        for (int lane = 0; lane < LANES; ++lane)
            sums[row][lane] = *reinterpret_cast<const Lane *>(c + row * c_width + lane * LANE);
    for (Index k = 0; k < depth; ++k) {
        Lane of_b[LANES];
        for (int lane = 0; lane < LANES; ++lane)
            of_b[lane] = *reinterpret_cast<const Lane *>(b + k * b_width + lane * LANE);
        for (int row = 0; row < ROWS; ++row)
            for (int lane = 0; lane < LANES; ++lane) sums[row][lane] += a[row * by_row + k * by_depth] * of_b[lane];
    }
    for (int row = 0; row < ROWS; ++row)
        for (int lane = 0; lane < LANES; ++lane)
            *reinterpret_cast<Lane *>(c + row * c_width + lane * LANE) = sums[row][lane];
}

template <int LANES>
inline void add_columns(Index rows, Index depth, const float *a, Index by_row, Index by_depth, const float *b,
                        Index b_width, float *c, Index c_width) {
    switch (rows) {
        case 6: add_tile<6, LANES>(depth, a, by_row, by_depth, b, b_width, c, c_width); break;
        case 5: add_tile<5, LANES>(depth, a, by_row, by_depth, b, b_width, c, c_width); break;
        case 4: add_tile<4, LANES>(depth, a, by_row, by_depth, b, b_width, c, c_width); break;
        case 3: add_tile<3, LANES>(depth, a, by_row, by_depth, b, b_width, c, c_width); break;
        case 2: add_tile<2, LANES>(depth, a, by_row, by_depth, b, b_width, c, c_width); break;
        default: add_tile<1, LANES>(depth, a, by_row, by_depth, b, b_width, c, c_width);
    }
}

// c [rows, columns] += a b for up to TILE rows; columns are whole lanes.
inline void add_product(Index rows, Index columns, Index depth, const float *a, Index by_row, Index by_depth,
                        const float *b, Index b_width, float *c, Index c_width) {
    Index column = 0;
    for (; column + BESIDE * LANE <= columns; column += BESIDE * LANE)
        add_columns<BESIDE>(rows, depth, a, by_row, by_depth, b + column, b_width, c + column, c_width);
    for (; column < columns; column += LANE)
        add_columns<1>(rows, depth, a, by_row, by_depth, b + column, b_width, c + column, c_width);
}

// The states of one record and head: S places, `stride` elements apart.
template <typename T> struct Head {
    T *first;
    Index stride;
};

// [S, B, groups, heads of a group, d], strides in elements; d in one piece.
template <typename T> struct States {
    T *data;
    Index by_place, by_record, by_group, by_head;
    Head<T> head(Index place, Index record, Index group, Index head = 0) const {
        return {data + place * by_place + record * by_record + group * by_group + head * by_head, by_place};
    }
};

// Tables of rotary positions [S, d / 2], or none.
template <typename T> struct Rotation {
    const T *cosine, *sine;
    // rows [S, d] in whole lanes, in place
    void turn(float *rows, Index places, Index width, float direction) const {
        if (!cosine) return;
        const Index half = width / 2, lanes = whole_lanes(width);
        for (Index place = 0; place < places; ++place) {
            float *row = rows + place * lanes;
            turn_halves(half, row, cosine + place * half, sine + place * half, direction, row);
        }
    }
};

// -> [S, d] times `factor`, in rows of whole lanes; what lies behind d stays as it is: zero, as buffers begin
template <typename T> void load(Head<const T> head, Index places, Index width, float factor, float *rows) {
    const Index lanes = whole_lanes(width);
    for (Index place = 0; place < places; ++place) {
        float *out = rows + place * lanes;
#pragma omp simd
        for (Index i = 0; i < width; ++i) out[i] = read(head.first[place * head.stride + i]) * factor;
    }
}

// [S, d] in rows of whole lanes -> [d, S] likewise
void transpose(const float *rows, Index places, Index width, float *transposed) {
    const Index lanes = whole_lanes(width), columns = whole_lanes(places);
    for (Index i = 0; i < width; ++i) {
        float *out = transposed + i * columns;
        for (Index place = 0; place < places; ++place) out[place] = rows[place * lanes + i];
    }
}

template <typename T> void store(const float *rows, Index places, Index width, float factor, Head<T> head) {
    const Index lanes = whole_lanes(width);
    for (Index place = 0; place < places; ++place) {
#pragma omp simd
        for (Index i = 0; i < width; ++i) write(head.first[place * head.stride + i], rows[place * lanes + i] * factor);
    }
}

struct Shape {
    Index longest, records, groups, each, width;  // tokens of the longest record; each: heads of a group
    bool causal;
    const std::int32_t *bounds;  // of a packed row: where each record begins, then the row's end; else none
};

// One record of those of a Shape.
struct Record {
    Index places, width;
    bool causal;
    Index before;         // tokens of the records before it
    Index first, column;  // where it begins, in a packed row and among records side by side
    Record(const Shape &shape, Index number)
        : places(shape.bounds ? shape.bounds[number + 1] - shape.bounds[number] : shape.longest), width(shape.width),
          causal(shape.causal), before(shape.bounds ? shape.bounds[number] : number * shape.longest),
          first(shape.bounds ? before : 0), column(shape.bounds ? 0 : number) {}
    Index lanes() const { return whole_lanes(width); }
    Index columns() const { return whole_lanes(places); }
    // how many keys the rows up to `end` see
    Index seen(Index end) const { return causal ? end : places; }
    template <typename T> Head<T> of(const States<T> &states, Index group, Index head = 0) const {
        return states.head(first, column, group, head);
    }
};

// Rows [start, end) of a head's scores, from queries that carry the scale already.
void scores(const Record &record, Index start, Index end, const float *queries, const float *keys_transposed,
            float *rows) {
    const Index lanes = record.lanes(), columns = record.columns();
    std::fill(rows + start * columns, rows + end * columns, 0.0f);
    add_product(end - start, whole_lanes(record.seen(end)), record.width, queries + start * lanes, lanes, 1,
                keys_transposed, columns, rows + start * columns, columns);
}

template <typename T>
void attend(const Shape &shape, States<const T> q, States<const T> k, States<const T> v, Rotation<T> rotation,
            float scale, States<T> found, float *logarithms) {
    const Index most = shape.longest, width = shape.width, lanes = whole_lanes(width), most_columns = whole_lanes(most);
    const Index heads = shape.groups * shape.each;
#pragma omp parallel
    {
        std::vector<float> keys(most * lanes), keys_transposed(width * most_columns), values(most * lanes);
        std::vector<float> queries(most * lanes), weights(most * most_columns), sums(most * lanes);
#pragma omp for collapse(2) schedule(dynamic)
        for (Index number = 0; number < shape.records; ++number)
            for (Index group = 0; group < shape.groups; ++group) {
                const Record record(shape, number);
                const Index places = record.places, columns = record.columns();
                load(record.of(k, group), places, width, 1, keys.data());
                rotation.turn(keys.data(), places, width, 1);
                transpose(keys.data(), places, width, keys_transposed.data());
                load(record.of(v, group), places, width, 1, values.data());
                for (Index head = 0; head < shape.each; ++head) {
                    load(record.of(q, group, head), places, width, scale, queries.data());
                    rotation.turn(queries.data(), places, width, 1);
                    std::fill_n(sums.begin(), places * lanes, 0.0f);
                    float *logarithm = logarithms + record.before * heads + (group * shape.each + head) * places;
                    for (Index start = 0; start < places; start += TILE) {
                        const Index end = std::min(start + TILE, places);
                        scores(record, start, end, queries.data(), keys_transposed.data(), weights.data());
                        for (Index row = start; row < end; ++row) {
                            float *of_row = weights.data() + row * columns;
                            const Index seen = record.seen(row + 1);
                            float largest = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : largest)
                            for (Index i = 0; i < seen; ++i) largest = std::max(largest, of_row[i]);
#pragma omp simd reduction(+ : total)
                            for (Index i = 0; i < seen; ++i) total += of_row[i] = exponential(of_row[i] - largest);
                            const float share = 1 / total;
#pragma omp simd
                            for (Index i = 0; i < seen; ++i) of_row[i] *= share;
                            std::fill(of_row + seen, of_row + columns, 0.0f);
                            logarithm[row] = largest + std::log(total);
                        }
                        add_product(end - start, lanes, record.seen(end), weights.data() + start * columns, columns, 1,
                                    values.data(), lanes, sums.data() + start * lanes, lanes);
                    }
                    store(sums.data(), places, width, 1, record.of(found, group, head));
                }
            }
    }
}

template <typename T>
void attend_backward(const Shape &shape, States<const T> q, States<const T> k, States<const T> v, Rotation<T> rotation,
                     float scale, const float *logarithms, States<const T> gradient, States<T> of_q, States<T> of_k,
                     States<T> of_v) {
    const Index most = shape.longest, width = shape.width, lanes = whole_lanes(width), most_columns = whole_lanes(most);
    const Index heads = shape.groups * shape.each;
#pragma omp parallel
    {
        std::vector<float> keys(most * lanes), keys_transposed(width * most_columns), values(most * lanes);
        std::vector<float> values_transposed(width * most_columns), queries(most * lanes), gradients(most * lanes);
        std::vector<float> weights(most * most_columns), of_weights(most * most_columns);
        std::vector<float> of_queries(most * lanes), of_keys(most * lanes), of_values(most * lanes);
#pragma omp for collapse(2) schedule(dynamic)
        for (Index number = 0; number < shape.records; ++number)
            for (Index group = 0; group < shape.groups; ++group) {
                const Record record(shape, number);
                const Index places = record.places, columns = record.columns();
                load(record.of(k, group), places, width, 1, keys.data());
                rotation.turn(keys.data(), places, width, 1);
                transpose(keys.data(), places, width, keys_transposed.data());
                load(record.of(v, group), places, width, 1, values.data());
                transpose(values.data(), places, width, values_transposed.data());
                std::fill_n(of_keys.begin(), places * lanes, 0.0f);
                std::fill_n(of_values.begin(), places * lanes, 0.0f);
                for (Index head = 0; head < shape.each; ++head) {
                    load(record.of(q, group, head), places, width, scale, queries.data());
                    rotation.turn(queries.data(), places, width, 1);
                    load(record.of(gradient, group, head), places, width, 1, gradients.data());
                    std::fill_n(of_queries.begin(), places * lanes, 0.0f);
                    const float *logarithm = logarithms + record.before * heads + (group * shape.each + head) * places;
                    for (Index start = 0; start < places; start += TILE) {
                        const Index end = std::min(start + TILE, places);
                        scores(record, start, end, queries.data(), keys_transposed.data(), weights.data());
                        scores(record, start, end, gradients.data(), values_transposed.data(), of_weights.data());
                        for (Index row = start; row < end; ++row) {
                            float *of_row = weights.data() + row * columns;
                            float *of_score = of_weights.data() + row * columns;
                            const Index seen = record.seen(row + 1);
                            float along = 0;
#pragma omp simd reduction(+ : along)
                            for (Index i = 0; i < seen; ++i) {
                                of_row[i] = exponential(of_row[i] - logarithm[row]);
                                along += of_row[i] * of_score[i];
                            }
#pragma omp simd
                            for (Index i = 0; i < seen; ++i) of_score[i] = of_row[i] * (of_score[i] - along);
                            std::fill(of_row + seen, of_row + columns, 0.0f);
                            std::fill(of_score + seen, of_score + columns, 0.0f);
                        }
                        add_product(end - start, lanes, record.seen(end), of_weights.data() + start * columns, columns,
                                    1, keys.data(), lanes, of_queries.data() + start * lanes, lanes);
                    }
                    for (Index start = 0; start < places; start += TILE) {  // of keys, which later rows see
                        const Index count = std::min(TILE, places - start), from = record.causal ? start : 0;
                        const Index at = from * columns + start;
                        add_product(count, lanes, places - from, weights.data() + at, 1, columns,
                                    gradients.data() + from * lanes, lanes, of_values.data() + start * lanes, lanes);
                        add_product(count, lanes, places - from, of_weights.data() + at, 1, columns,
                                    queries.data() + from * lanes, lanes, of_keys.data() + start * lanes, lanes);
                    }
                    rotation.turn(of_queries.data(), places, width, -1);
                    store(of_queries.data(), places, width, scale, record.of(of_q, group, head));
                }
                rotation.turn(of_keys.data(), places, width, -1);
                store(of_keys.data(), places, width, 1, record.of(of_k, group));
                store(of_values.data(), places, width, 1, record.of(of_v, group));
            }
    }
}

}  // namespace

// Each tensor of states: where it lies, and its strides by place, record, group and head, in elements.
#define OF_STATES(T, NAME) T *NAME, Index NAME##_place, Index NAME##_record, Index NAME##_group, Index NAME##_head
#define STATES(NAME) {NAME, NAME##_place, NAME##_record, NAME##_group, NAME##_head}

// The same of a Shape.
#define OF_SHAPE                                                                                                       \
    Index longest, Index records, const std::int32_t *bounds, Index groups, Index each, Index width, Index causal
#define SHAPE {longest, records, groups, each, width, causal != 0, bounds}

#define BOTH(T, SUFFIX)                                                                                                \
    extern "C" void attention##SUFFIX(OF_SHAPE, OF_STATES(const T, q), OF_STATES(const T, k), OF_STATES(const T, v),   \
                                      const T *cosine, const T *sine, float scale, OF_STATES(T, found),                \
                                      float *logarithms) {                                                             \
        attend<T>(SHAPE, STATES(q), STATES(k), STATES(v), {cosine, sine}, scale, STATES(found), logarithms);           \
    }                                                                                                                  \
    extern "C" void attention_backward##SUFFIX(                                                                        \
        OF_SHAPE, OF_STATES(const T, q), OF_STATES(const T, k), OF_STATES(const T, v), const T *cosine, const T *sine, \
        float scale, const float *logarithms, OF_STATES(const T, gradient), OF_STATES(T, of_q), OF_STATES(T, of_k),    \
        OF_STATES(T, of_v)) {                                                                                          \
        attend_backward<T>(SHAPE, STATES(q), STATES(k), STATES(v), {cosine, sine}, scale, logarithms,                  \
                           STATES(gradient), STATES(of_q), STATES(of_k), STATES(of_v));                                \
    }

BOTH(float, _fp32)
BOTH(bfloat16, _bf16)
