// The calls that GCC makes for OpenMP's parallel regions, barriers and dynamic loops, over std::thread. The
// thread sanitizer does not see how libgomp's own threads wait for each other and would report every
// parallel loop; locks and joins it understands. Regions do not nest.

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// What the threads of one parallel region share.
struct Team {
  explicit Team(int num_threads) : size(num_threads) {}

  void wait_for_all() {
    std::unique_lock<std::mutex> lock(mutex);
    const int round = rounds;
    if (++num_waiting == size) {
      num_waiting = 0;
      ++rounds;
      all_came.notify_all();
    } else {
      all_came.wait(lock, [&] { return rounds != round; });
    }
  }

  const int size;
  std::mutex mutex;
  std::condition_variable all_came;
  int num_waiting = 0, rounds = 0;
  std::vector<long> loop_to_next;  // the first iteration of each dynamic loop that no thread has
};

struct Loop {
  std::size_t number = 0;  // dynamic loops of the region that this thread has begun
  long end = 0, step = 0, chunk = 0;
};

thread_local Team *team = nullptr;
thread_local int own_number = 0;
thread_local Loop loop;

void run(void (*body)(void *), void *arguments, Team *shared, int number) {
  team = shared;
  own_number = number;
  loop = Loop();
  body(arguments);
  team = nullptr;
  own_number = 0;
}

bool take_iterations(long *first, long *end) {
  std::lock_guard<std::mutex> lock(team->mutex);
  long &next = team->loop_to_next[loop.number - 1];
  if (next >= loop.end) return false;
  *first = next;
  next += loop.step * loop.chunk;
  *end = next < loop.end ? next : loop.end;
  return true;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void *), void *arguments, unsigned num_threads, unsigned) {
  Team shared(num_threads == 0 ? 2 : static_cast<int>(num_threads));
  std::vector<std::thread> others;
  for (int number = 1; number < shared.size; ++number) {
    others.emplace_back(run, body, arguments, &shared, number);
  }
  run(body, arguments, &shared, 0);
  for (std::thread &other : others) other.join();
}

void GOMP_barrier(void) {
  if (team != nullptr) team->wait_for_all();
}

// Steps are positive in this library.
bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *first,
                                          long *last) {
  loop = {loop.number + 1, end, step, chunk};
  {
    std::lock_guard<std::mutex> lock(team->mutex);
    if (team->loop_to_next.size() < loop.number) team->loop_to_next.push_back(start);
  }
  return take_iterations(first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last) {
  return take_iterations(first, last);
}

void GOMP_loop_end(void) { GOMP_barrier(); }

void GOMP_loop_end_nowait(void) {}

int omp_get_thread_num(void) { return own_number; }

int omp_get_num_threads(void) { return team == nullptr ? 1 : team->size; }

}  // extern "C"
