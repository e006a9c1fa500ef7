// Read share of a STREAM-like measurement: THREADS threads add up their parts of one array of 64-bit numbers.
// Prints the bytes per second of the fastest and of the median run. Compiled by test_bandwidth.py.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { RUNS = 11, MAX_THREADS = 64 };
static const size_t COUNT = (size_t)1 << 26;  // 512 MB

static uint64_t *numbers;
static uint64_t sums[MAX_THREADS * 8];
static int threads;
static pthread_barrier_t barrier;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *work(void *argument) {
    size_t index = (size_t)argument, begin = COUNT / threads * index, end = begin + COUNT / threads;
    for (int run = 0; run <= RUNS; run++) {
        pthread_barrier_wait(&barrier);
        uint64_t a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
        for (size_t i = begin; i + 32 <= end; i += 32) {
            for (int j = 0; j < 4; j++) {
                const uint64_t *p = numbers + i + 8 * j;
                __builtin_prefetch(p + 512);
                a += p[0]; b += p[1]; c += p[2]; d += p[3]; e += p[4]; f += p[5]; g += p[6]; h += p[7];
            }
        }
        sums[8 * index] += a + b + c + d + e + f + g + h;
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **arguments) {
    threads = count > 1 ? atoi(arguments[1]) : 1;
    if (threads < 1 || threads > MAX_THREADS || posix_memalign((void **)&numbers, 1 << 21, COUNT * 8)) return 1;
    madvise(numbers, COUNT * 8, MADV_HUGEPAGE);
    for (size_t i = 0; i < COUNT; i++) numbers[i] = i;
    pthread_barrier_init(&barrier, NULL, threads + 1);
    pthread_t handles[MAX_THREADS];
    for (size_t i = 0; i < (size_t)threads; i++) pthread_create(&handles[i], NULL, work, (void *)i);
    double seconds[RUNS + 1];
    for (int run = 0; run <= RUNS; run++) {
        double start = now();
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        seconds[run] = now() - start;
    }
    for (int i = 0; i < threads; i++) pthread_join(handles[i], NULL);
    qsort(seconds + 1, RUNS, sizeof(double), compare);
    printf("%.0f %.0f %llu\n", COUNT * 8 / seconds[1], COUNT * 8 / seconds[1 + RUNS / 2], (unsigned long long)sums[0]);
    return 0;
}
