#include "clocks.h"

#include <algorithm>

namespace simt {

Clocks clocks;

namespace {

uint32_t* news_of(int thread) {
  uint32_t* row = clocks.news[thread];
  if (clocks.news_epoch[thread] != clocks.epoch) {
    std::fill(row, row + clocks.agents, 0);
    clocks.news_epoch[thread] = clocks.epoch;
  }
  return row;
}

void raise(uint32_t* times, const uint32_t* other, int count) {
  for (int i = 0; i < count; i++) times[i] = std::max(times[i], other[i]);
}

}  // namespace

void reset_clocks(int threads) {
  clocks.agents = threads + kEngines;
  std::fill(clocks.time, clocks.time + clocks.agents, 1);
  std::fill(clocks.floor, clocks.floor + clocks.agents, 0);
  clocks.epoch++;
}

void learn(int observer, int agent, uint32_t time) {
  uint32_t& known = news_of(observer)[agent];
  known = std::max(known, time);
}

uint32_t advance(int agent) { return clocks.time[agent]++; }

void tell(int thread, uint32_t until, Clock& message) {
  message.resize(clocks.agents);
  raise(message.data(), clocks.floor, clocks.agents);
  raise(message.data(), news_of(thread), clocks.agents);
  message[thread] = std::max(message[thread], until);
}

void release(int thread, Clock& message) { tell(thread, advance(thread), message); }

void acquire(int thread, const Clock& message) {
  raise(news_of(thread), message.data(), static_cast<int>(message.size()));
}

void meet(const int* threads, int count) {
  static uint32_t all[kMaxAgents];
  std::fill(all, all + clocks.agents, 0);
  for (int i = 0; i < count; i++) raise(all, news_of(threads[i]), clocks.agents);
  for (int i = 0; i < count; i++) all[threads[i]] = advance(threads[i]);
  for (int i = 0; i < count; i++) std::copy(all, all + clocks.agents, clocks.news[threads[i]]);
}

void meet_all() {
  const int threads = clocks.agents - kEngines;
  for (int t = 0; t < threads; t++)
    if (clocks.news_epoch[t] == clocks.epoch) raise(clocks.floor + threads, clocks.news[t] + threads, kEngines);
  for (int t = 0; t < threads; t++) clocks.floor[t] = advance(t);
  clocks.epoch++;  // empties every row: the floor now covers them
}

}  // namespace simt
