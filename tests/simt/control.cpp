// What every library exports beside its own functions, for build.py.
#include "host.h"

SIMT_EXPORT simt::Config* simt_config() { return &simt::config; }
SIMT_EXPORT void simt_reset_config() { simt::config = simt::Config(); }
SIMT_EXPORT simt::Stats* simt_stats() { return &simt::stats; }
SIMT_EXPORT const char* simt_error() { return simt::error(); }
