// The helper threads of this process. See crew.h for what they do.
#pragma once

#include "crew.h"

namespace qc {

// A crew of at most so many threads, the caller's among them; of one thread if another caller has the helpers.
// Give it back with `disband` before the next is asked for.
Crew assemble(int threads);
void disband(const Crew &crew);

// How long a helper looks for work before it sleeps, microseconds.
void spin_for(int64_t microseconds);

}  // namespace qc
