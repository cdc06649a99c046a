/* Copies in host memory by several threads: one is far slower than the bus to the GPU. */
#ifndef COPYING_H
#define COPYING_H

#include <pthread.h>
#include <stddef.h>

enum { MOST_COPYING_THREADS = 8 };

/* What is worth a thread's while: waking one takes about as long as copying a few hundred kilobytes. */
static const size_t COPIED_ALONE = 1 << 20;

struct copy {
    char *to;
    const char *from;
    size_t bytes;
};

/* A place in a list of copies: `before` counts the bytes that come before it. */
struct place {
    size_t index, offset, before;
};

/* Copies that are made block by block, in their order, by whoever takes the next block. */
struct copying {
    const struct copy *copies;
    size_t count, bytes;
    struct place next;                        /* what nobody has taken yet */
    size_t in_work[MOST_COPYING_THREADS];     /* bytes before the block that each thread works on */
    pthread_cond_t changed;
    struct copying *following;                /* in the list of those that want help */
};

/* Let others begin. The copies and the job stay where they are until `copying_end`. */
void copying_begin(struct copying *job, const struct copy *copies, size_t count);

/* Take part until the first `bytes` bytes have arrived; returns how many have. */
size_t copying_advance(struct copying *job, size_t bytes);

/* Nobody reads or writes for this job any more, whether all was copied or not. */
void copying_end(struct copying *job);

/* One copy, by several threads where that pays. */
void copy_bytes(char *to, const char *from, size_t bytes);

/* A forked process has neither the threads nor whoever held the lock. */
void copying_after_fork(void);

#endif
