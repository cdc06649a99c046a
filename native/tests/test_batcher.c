/* Many callers on a stand-in for the GPU that is slow and fails at random, while slots are lent and called back, under a
 * sanitizer: everybody gets its own results, one batch runs at a time, and nothing but valid rows is ever computed. */
#define _POSIX_C_SOURCE 200809L /* nanosleep */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../batcher.h"

enum { CALLERS = 12, CALLS = 150, ROUTES = 2, SIZES = 4, LARGEST = 8, INPUTS = 2, TENSORS = 4, LENT = 2 };

static const size_t sizes[SIZES] = {1, 2, 4, LARGEST};
/* Of each tensor, in words; the last route's rows are what several threads copy. */
static const size_t row_words[ROUTES][TENSORS] = {{3, 1, 2, 3}, {150000, 2, 1, 20000}};
static const size_t most_in_graph[ROUTES] = {2, 1}; /* rows that are not uploaded by who copies them */

struct stream {
    uint32_t *tensors[TENSORS], *on_gpu[INPUTS];
    const struct graph *launched;
};

struct graph {
    struct stream *stream;
    size_t route, size;
};

static struct batcher batcher;
static struct stream streams[LENT];
static struct graph graphs[LENT][ROUTES][SIZES];
static int routes[ROUTES];
static atomic_int in_flight, pushed, callers_left, fails, is_slow, all_together;
static atomic_size_t ran, away, failed, together;

static void check(int holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static uint32_t next_random(uint32_t *state) {
    return (*state = *state * 1664525u + 1013904223u) >> 8;
}

static void spin(uint32_t rounds) {
    for (volatile uint32_t round = 0; round < rounds; round = round + 1) {
    }
}

static void pause_for(uint32_t microseconds) {
    nanosleep(&(struct timespec){.tv_nsec = 1000L * microseconds}, NULL);
}

/* A row of an input is words that follow from its first one; a row of an output is computed from both inputs' first. */
static uint32_t input_word(uint32_t first, size_t tensor, size_t word) {
    return word ? first * 31u + (uint32_t)(tensor * 7 + word) : first;
}

static uint32_t output_word(uint32_t one, uint32_t two, size_t tensor, size_t word) {
    return one * 2654435761u ^ (two + (uint32_t)(tensor * 131 + word));
}

static int push(void *context) {
    check(context == &batcher, "another context");
    atomic_fetch_add(&pushed, 1);
    return 0;
}

static int pop(void **context) {
    *context = &batcher;
    atomic_fetch_sub(&pushed, 1);
    return 0;
}

static int upload(unsigned long long to, const void *from, size_t bytes, void *stream_handle) {
    struct stream *stream = stream_handle;
    check(bytes > 0, "an upload of nothing");
    for (size_t tensor = 0; tensor < INPUTS; tensor++) {
        uintptr_t start = (uintptr_t)stream->on_gpu[tensor], offset = (uintptr_t)to - start;
        if (offset < LARGEST * row_words[1][tensor] * sizeof(uint32_t)) {
            check(from == (const char *)stream->tensors[tensor] + offset, "an upload of something else");
            memcpy((void *)(uintptr_t)to, from, bytes);
            static atomic_uint uploads;
            return atomic_load(&fails) && atomic_fetch_add(&uploads, 1) % 97 == 96 ? 700 : 0;
        }
    }
    check(0, "an upload to somewhere else");
    return 1;
}

static int launch(void *handle, void *stream_handle) {
    struct graph *graph = handle;
    struct stream *stream = stream_handle;
    check(graph->stream == stream && !stream->launched, "a graph of another stream, or two at once");
    check(atomic_fetch_add(&in_flight, 1) == 0, "two batches run at the same time");
    static uint32_t random = 1; /* launches come one after the other */
    stream->launched = graph;
    return atomic_load(&fails) && next_random(&random) % 11 == 0 ? 2 : 0; /* it may run all the same */
}

static int synchronize(void *stream_handle) {
    struct stream *stream = stream_handle;
    const struct graph *graph = stream->launched;
    static uint32_t random = 2;
    int status = 0;
    if (atomic_load(&is_slow))
        pause_for(20000);
    else
        spin(next_random(&random) % 20000);
    if (graph) {
        const size_t *words = row_words[graph->route];
        for (size_t tensor = 0; tensor < INPUTS && sizes[graph->size] <= most_in_graph[graph->route]; tensor++)
            memcpy(stream->on_gpu[tensor], stream->tensors[tensor],
                   sizes[graph->size] * words[tensor] * sizeof(uint32_t));
        for (size_t row = 0; row < sizes[graph->size]; row++) {
            uint32_t firsts[INPUTS];
            for (size_t tensor = 0; tensor < INPUTS; tensor++) {
                const uint32_t *values = stream->on_gpu[tensor] + row * words[tensor];
                firsts[tensor] = values[0];
                for (size_t word = 0; word < words[tensor]; word += 1 + words[tensor] / 50)
                    check(values[word] == input_word(values[0], tensor, word), "a row that nobody sent");
            }
            for (size_t tensor = INPUTS; tensor < TENSORS; tensor++)
                for (size_t word = 0; word < words[tensor]; word++)
                    stream->tensors[tensor][row * words[tensor] + word] =
                        output_word(firsts[0], firsts[1], tensor, word);
        }
        if (atomic_load(&fails) && next_random(&random) % 13 == 0)
            status = 700;
        stream->launched = NULL;
        atomic_fetch_sub(&in_flight, 1);
    }
    return status;
}

static void *call_again_and_again(void *argument) {
    uint32_t random = (uint32_t)(uintptr_t)argument;
    for (int call = 0; call < CALLS;) {
        size_t kind = next_random(&random) % 8 == 0, rows = 1 + next_random(&random) % 3;
        const size_t *words = row_words[kind];
        uint32_t *arrays[TENSORS];
        char *addresses[TENSORS];
        struct request request = {.route = (size_t)routes[kind], .rows = rows, .tensors = addresses};
        for (size_t tensor = 0; tensor < TENSORS; tensor++) {
            arrays[tensor] = calloc(rows * words[tensor], sizeof(uint32_t)); /* of just this size: beyond is an error */
            check(arrays[tensor] != NULL, "no memory");
            addresses[tensor] = (char *)arrays[tensor];
            for (size_t row = 0; tensor < INPUTS && row < rows; row++) {
                uint32_t first = next_random(&random);
                for (size_t word = 0; word < words[tensor]; word++)
                    arrays[tensor][row * words[tensor] + word] = input_word(first, tensor, word);
            }
        }
        batcher_run(&batcher, &request);
        if (request.outcome == RAN) {
            call++;
            atomic_fetch_add(&ran, 1);
            if (request.company > 1)
                atomic_fetch_add(&together, 1);
            for (size_t tensor = INPUTS; tensor < TENSORS; tensor++)
                for (size_t index = 0; index < rows * words[tensor]; index++) {
                    size_t row = index / words[tensor], word = index % words[tensor];
                    check(arrays[tensor][index] ==
                              output_word(arrays[0][row * words[0]], arrays[1][row * words[1]], tensor, word),
                          "somebody else's results");
                }
        } else if (request.outcome == FAILED) {
            check(request.status == 2 || request.status == 700, "another status");
            call++;
            atomic_fetch_add(&failed, 1);
        } else {
            atomic_fetch_add(&away, 1);
            pause_for(1000);
        }
        for (size_t tensor = 0; tensor < TENSORS; tensor++)
            free(arrays[tensor]);
    }
    atomic_fetch_sub(&callers_left, 1);
    return NULL;
}

/* Three of these would never run together if they were not waited for: a batch takes half of the rows there are. */
static void *call_until_all_ran_together(void *nothing) {
    (void)nothing;
    while (!atomic_load(&all_together)) {
        const size_t *words = row_words[0];
        uint32_t arrays[TENSORS][3] = {{0}};
        char *addresses[TENSORS];
        struct request request = {.route = (size_t)routes[0], .rows = 1, .tensors = addresses};
        for (size_t tensor = 0; tensor < TENSORS; tensor++) {
            addresses[tensor] = (char *)arrays[tensor];
            for (size_t word = 0; tensor < INPUTS && word < words[tensor]; word++)
                arrays[tensor][word] = input_word(7, tensor, word);
        }
        batcher_run(&batcher, &request);
        check(request.outcome == RAN, "it did not run");
        if (request.company == 3)
            atomic_store(&all_together, 1);
    }
    return NULL;
}

static void lend(uint32_t *random, size_t count, int all) {
    for (size_t slot = 0; slot < count; slot++) {
        char *addresses[TENSORS];
        for (size_t tensor = 0; tensor < TENSORS; tensor++)
            addresses[tensor] = (char *)streams[slot].tensors[tensor];
        unsigned long long inputs[INPUTS];
        for (size_t tensor = 0; tensor < INPUTS; tensor++)
            inputs[tensor] = (uintptr_t)streams[slot].on_gpu[tensor];
        batcher_lend(&batcher, slot, &streams[slot], addresses, inputs);
        for (size_t kind = 0; kind < ROUTES; kind++)
            for (size_t size = 0; size < SIZES; size++)
                if (all || size < 2 || next_random(random) % 4) /* some graphs are not there yet */
                    batcher_set_graph(&batcher, slot, (size_t)routes[kind], size, &graphs[slot][kind][size]);
    }
    batcher_open(&batcher);
}

int main(void) {
    alarm(600); /* a caller that is never woken */
    pthread_t callers[CALLERS];
    struct driver driver = {push, pop, upload, launch, synchronize, &batcher};
    size_t row_bytes[ROUTES][TENSORS];
    uint32_t random = 3;
    check(batcher_init(&batcher, driver, INPUTS, TENSORS - INPUTS, 1.0) == 0, "no batcher");
    for (size_t kind = 0; kind < ROUTES; kind++) {
        for (size_t tensor = 0; tensor < TENSORS; tensor++)
            row_bytes[kind][tensor] = row_words[kind][tensor] * sizeof(uint32_t);
        routes[kind] = batcher_add_route(&batcher, sizes, SIZES, row_bytes[kind], most_in_graph[kind]);
    }
    for (size_t slot = 0; slot < LENT; slot++) {
        for (size_t tensor = 0; tensor < TENSORS; tensor++)
            check((streams[slot].tensors[tensor] = malloc(LARGEST * row_bytes[1][tensor] + 64)) != NULL, "no memory");
        for (size_t tensor = 0; tensor < INPUTS; tensor++)
            check((streams[slot].on_gpu[tensor] = malloc(LARGEST * row_bytes[1][tensor] + 64)) != NULL, "no memory");
        for (size_t kind = 0; kind < ROUTES; kind++)
            for (size_t size = 0; size < SIZES; size++)
                graphs[slot][kind][size] = (struct graph){&streams[slot], kind, size};
    }
    atomic_store(&callers_left, CALLERS);
    for (uintptr_t number = 0; number < CALLERS; number++)
        check(!pthread_create(&callers[number], NULL, call_again_and_again, (void *)(number + 10)), "no thread");
    while (atomic_load(&callers_left)) {
        atomic_store(&fails, next_random(&random) % 2);
        lend(&random, 1 + next_random(&random) % LENT, 0);
        pause_for(next_random(&random) % 20000);
        batcher_recall(&batcher);
        for (size_t slot = 0; slot < LENT; slot++) /* it is not the batcher's any more */
            for (size_t tensor = 0; tensor < TENSORS; tensor++)
                memset(streams[slot].tensors[tensor], 0xA5, LARGEST * row_bytes[0][tensor]);
        for (size_t slot = 0; slot < LENT; slot++)
            for (size_t tensor = 0; tensor < INPUTS; tensor++)
                memset(streams[slot].on_gpu[tensor], 0xA5, LARGEST * row_bytes[0][tensor]);
    }
    for (size_t number = 0; number < CALLERS; number++)
        pthread_join(callers[number], NULL);
    atomic_store(&fails, 0);
    atomic_store(&is_slow, 1);
    lend(&random, LENT, 1);
    for (size_t number = 0; number < 3; number++)
        check(!pthread_create(&callers[number], NULL, call_until_all_ran_together, NULL), "no thread");
    for (size_t number = 0; number < 3; number++)
        pthread_join(callers[number], NULL);
    batcher_recall(&batcher);
    check(atomic_load(&pushed) == 0 && atomic_load(&in_flight) == 0, "something is left");
    check(ran + failed == CALLERS * CALLS, "a call was lost");
    check(ran > CALLS && failed && together && away, "something never happened");
    for (size_t slot = 0; slot < LENT; slot++)
        for (size_t tensor = 0; tensor < TENSORS; tensor++) {
            free(streams[slot].tensors[tensor]);
            if (tensor < INPUTS)
                free(streams[slot].on_gpu[tensor]);
        }
    batcher_free(&batcher);
    printf("batcher: ok, %zu ran, %zu of them together, %zu failed, %zu had to go away\n", (size_t)ran, (size_t)together,
           (size_t)failed, (size_t)away);
    return 0;
}
