// Package agent is what every host runs: it takes the jobs of its host, makes a
// private clone or copy of the patch's image, starts the runner, follows it,
// and reports how it ended.
//
// # The journal
//
// Each job has a folder <state-dir>/jobs/<job uuid>. What is about to be done
// is written there before it is done, so that whoever starts next knows what
// to finish and what to undo:
//
//	entry.json   the assignment and the plan; written before the clone is made
//	run.json     what the runner shall do; written before it is started
//	begun        written by the runner right before `apply` runs
//	output       what the patch prints, capped
//	progress     the last progress line
//	result.json  how it ended; written by the runner as its last act
//	runner.log   what the runner itself says
//	mnt          where the runner mounts the clone, in its own mount namespace
//
// # How a job ends
//
// Settle is one function for the end of a run and for the start after a crash:
// a stampfile says applied; a result file says that result; a living runner is
// followed; `begun` and neither is unknown; everything else never began. What
// fails on the way is tried again, by this process and by the next.
//
// # The runner
//
// The runner is a process of its own, in a control group outside the daemon's:
// a patch may restart or upgrade patchd and still finishes.
package agent
