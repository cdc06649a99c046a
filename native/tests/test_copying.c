/* Many copies at the same time, under a sanitizer: what arrives, in which order, and what is left when one ends early. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../copying.h"

enum { THREADS = 6, ROUNDS = 8, MOST_COPIES = 5 };

static void check(int holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static void fill(char *bytes, size_t count, unsigned *random) {
    for (size_t index = 0; index < count; index++)
        bytes[index] = (char)(*random = *random * 1103515245 + 12345);
}

static void *copy_again_and_again(void *argument) {
    unsigned random = (unsigned)(uintptr_t)argument;
    for (int round = 0; round < ROUNDS; round++) {
        struct copy copies[MOST_COPIES];
        size_t count = 1 + random % MOST_COPIES, total = 0;
        for (size_t index = 0; index < count; index++) {
            fill((char *)&random, 1, &random);
            size_t bytes = 1 + random % (3u << 20);
            char *from = malloc(bytes), *to = calloc(bytes, 1);
            check(from && to, "no memory");
            fill(from, bytes, &random);
            copies[index] = (struct copy){to, from, bytes};
            total += bytes;
        }
        struct copying job;
        copying_begin(&job, copies, count);
        size_t ends_early = round % 4 == 3, until = ends_early ? total / 3 : total;
        size_t arrived = copying_advance(&job, until / 2);
        check(arrived >= until / 2, "less arrived than was waited for");
        check(copying_advance(&job, until) >= until, "less arrived than was waited for at the end");
        for (size_t index = 0, before = 0; index < count && before < until; before += copies[index++].bytes) {
            size_t bytes = copies[index].bytes < until - before ? copies[index].bytes : until - before;
            check(memcmp(copies[index].to, copies[index].from, bytes) == 0, "something else arrived");
        }
        copying_end(&job);
        for (size_t index = 0; index < count; index++) {
            free((void *)copies[index].from); /* a helper that still read it would be caught here */
            free(copies[index].to);
        }
    }
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    for (uintptr_t number = 0; number < THREADS; number++)
        check(!pthread_create(&threads[number], NULL, copy_again_and_again, (void *)(number + 1)), "no thread");
    for (size_t number = 0; number < THREADS; number++)
        pthread_join(threads[number], NULL);
    puts("copying: ok");
    return 0;
}
