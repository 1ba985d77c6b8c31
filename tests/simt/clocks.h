// Happens-before as vector clocks. An agent is a thread of the running block, or one of the asynchronous engines that
// come after the threads. Every agent counts its own time; what it knows of another's time orders their accesses.
//
// A thread's knowledge is `floor` (what the last barrier of the whole block told everyone) plus its own row of news,
// which is empty until it takes part in anything finer.
#pragma once

#include <cstdint>
#include <vector>

#include "fiber.h"

namespace simt {

constexpr int kEngines = 8;  // agents behind the threads: agent(threads + i) is engine i, one per warpgroup of 128
constexpr int kMaxAgents = kMaxThreads + kEngines;

struct Clocks {
  int agents;                        // of the running block: its threads + kEngines
  uint32_t time[kMaxAgents];         // starts at 1
  uint32_t floor[kMaxAgents];        // times that every thread knows of
  uint32_t epoch;                    // counts barriers of the whole block
  uint32_t news_epoch[kMaxThreads];  // the epoch a row belongs to; older rows are empty
  uint32_t news[kMaxThreads][kMaxAgents];
};
extern Clocks clocks;

using Clock = std::vector<uint32_t>;  // a message: times by agent; {} knows nothing

void reset_clocks(int threads);

// Whether what `agent` did at `time` or before comes before what thread `observer` does next.
inline bool ordered(int observer, int agent, uint32_t time) {
  return agent == observer || time <= clocks.floor[agent] ||
         (clocks.news_epoch[observer] == clocks.epoch && time <= clocks.news[observer][agent]);
}
void learn(int observer, int agent, uint32_t time);  // makes that so
uint32_t advance(int agent);                         // ends the agent's present time and returns it

void tell(int thread, uint32_t until, Clock& message);  // adds what the thread knows, and that it did all `until`
void release(int thread, Clock& message);               // tells everything up to now, and advances the thread
void acquire(int thread, const Clock& message);         // the thread learns all of it
void meet(const int* threads, int count);               // all of them release, then all acquire
void meet_all();                                        // the whole block

}  // namespace simt
