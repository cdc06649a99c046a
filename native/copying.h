/* Copies in host memory by several threads: one is far slower than the bus to the GPU. */
#ifndef COPYING_H
#define COPYING_H

#include <stdatomic.h>
#include <stddef.h>

/* What is worth a thread's while: waking one takes about as long as copying a few hundred kilobytes. */
static const size_t COPIED_ALONE = 1 << 20;

struct copy {
    char *to;
    const char *from;
    size_t bytes;
};

struct block {
    char *to;
    const char *from;
    size_t bytes;
    atomic_int is_done;
};

/* Copies that are made block by block, in their order, by whoever takes the next block. */
struct copying {
    struct block *blocks; /* none: all was copied at once, since there was no memory for them */
    size_t count, bytes;
    atomic_size_t next;         /* that nobody has taken yet */
    atomic_size_t helpers;      /* threads that look into this */
    size_t front, front_bytes;  /* blocks that have arrived without a gap, as far as the owner has seen */
    struct copying *following;  /* in the list of those that want help */
};

/* Let others begin. What is copied, and the job, stay where they are until `copying_end`. */
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
