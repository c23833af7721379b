"""How long a cache line takes from one core to another and back.

Virtual machines move their cores about: near ones answer in some 50 ns, far ones in 500 to 1000, and then
every runtime that shares work between two threads is slower. Two-thread times compare only where it is alike.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PING_PONG = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

enum { ROUNDS = 200000 };
static _Alignas(128) atomic_int ball;
static cpu_set_t allowed;

static void pin(int nth) {
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &allowed) && nth-- == 0) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      pthread_setaffinity_np(pthread_self(), sizeof one, &one);
      return;
    }
}

static void *other(void *unused) {
  pin(1);
  for (int i = 0; i < ROUNDS; i++) {
    while (atomic_load_explicit(&ball, memory_order_acquire) != 2 * i + 1) {}
    atomic_store_explicit(&ball, 2 * i + 2, memory_order_release);
  }
  return unused;
}

int main(void) {
  struct timespec a, b;
  pthread_t thread;
  sched_getaffinity(0, sizeof allowed, &allowed);
  if (CPU_COUNT(&allowed) < 2) return 1;
  pin(0);
  pthread_create(&thread, 0, other, 0);
  for (int i = 0; i < ROUNDS; i++) {
    if (i == ROUNDS / 10) clock_gettime(CLOCK_MONOTONIC, &a);
    atomic_store_explicit(&ball, 2 * i + 1, memory_order_release);
    while (atomic_load_explicit(&ball, memory_order_acquire) != 2 * i + 2) {}
  }
  clock_gettime(CLOCK_MONOTONIC, &b);
  pthread_join(thread, 0);
  printf("%.1f\n", ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)) / (ROUNDS - ROUNDS / 10));
  return 0;
}
"""


class RoundTrip:
    """Measures on demand; `nanoseconds` keeps what was seen."""

    def __init__(self, folder: Path) -> None:
        self.nanoseconds: list[float] = []
        self._program = folder / "pingpong"
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler:
            source = folder / "pingpong.c"
            source.write_text(PING_PONG)
            command = [compiler, "-O2", "-std=gnu11", "-pthread", str(source), "-o", str(self._program)]
            subprocess.run(command, capture_output=True, timeout=60, check=False)

    def measure(self) -> None:
        """One more figure, where there is a compiler and a second core."""
        if self._program.exists():
            done = subprocess.run([str(self._program)], capture_output=True, text=True, timeout=60, check=False)
            if done.returncode == 0:
                self.nanoseconds.append(float(done.stdout))
