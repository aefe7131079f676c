/* Who owns a flow, and how it changes hands: the rules of docs/ownership.md as a model that spin checks exhaustively.
 *
 * It mirrors source_*.py, target.py, saga.py, jobs.py and peer.py. One line of a `do` is one row of the table in
 * docs/ownership.md, under the same name; EV prints it, so that a trail of spin reads as a sequence of rows and
 * tests/net/test_ownership_traces.py can play it against real agents.
 *
 *   Source(b), Target(b)   what each agent does with batch b. Both batches of a job are under way at once.
 *   Job                    what belongs to the job as a whole: abort, RELEASE, the address.
 *   Faults                 crash and death, loss, and time running out. Each as often as it likes, in any order.
 *
 * What survives what:
 *   journals (sent, committed, ...) and sockets (slive, tlive)   an agent's crash; not the death of its node
 *   phase, state                                                 nothing: a restarted agent finds them in its journal
 *   the sockets of a pod that dies: what is live ends; what is held lives on in its agent, but never goes live again
 *   ship, said_restored, ...                                     messages. Once said, a message may be delivered at any later time, any number of times
 *       and in any order, or be lost. A peer session ends with the agent that serves it, so a target that restarts
 *       hears nothing of what was said before; and a source that restarts hears no answer to what it asked before.
 *   Partition is the loss or the delay of all messages while it lasts.
 *
 * Faults end one day. Then whatever can happen happens, and Judge looks at what is left when nothing can. A cycle after
 * the faults would be a job that never ends; spin looks for it with -DNP.
 *
 * Build with -DWAIT for switchover Wait: one batch, COMMIT only once the address is proved at the target. -DONE: Steer
 * with one batch.
 * -DMUTANT=n breaks one rule (negative controls; the list is at the end of this file).
 */

#ifdef WAIT
#define STEER 0
#define N 1
#else
#define STEER 1
#ifdef ONE
#define N 1
#else
#define N 2
#endif
#endif
#ifndef MUTANT
#define MUTANT 0
#endif

/* A row has happened to batch b. Built with -DTRACE, a search ends at the end of a run in which the rows of $GOAL came in
 * that order ("COMMIT SOURCE_CRASHES": somewhere after it; "COMMIT +SOURCE_CRASHES": next), and its trail says after
 * each row what is true then. With -DBFS it is the shortest such run.
 */
#ifdef TRACE
byte goal;                /* rows of $GOAL that came */
c_code {
	\#include <string.h>
	static char rows[16][32];
	static int goals = -1;

	static int came(int goal, const char *row)
	{
		if (goals < 0) {
			char *all = strdup(getenv("GOAL")), *next = strtok(all, " ");
			for (goals = 0; next && goals < 16; next = strtok(0, " "))
				strncpy(rows[goals++], next, sizeof(rows[0]) - 1);
		}
		if (goal == goals)
			return goal;
		if (rows[goal][0] == '+')
			return strcmp(rows[goal] + 1, row) ? goal - 1 : goal + 1;
		return goal + !strcmp(rows[goal], row);
	}
}
#define EV(name) c_code { now.goal = came(now.goal, #name); if (readtrail) printf("@ %s ", #name); }; \
	printf("%d: live %d %d source %d %d %d target %d %d %d address %d\n", b, slive[b], tlive[b], \
	sent[b], committed[b], aborted[b], restored[b], activated[b], discarded[b], addr == AT_TARGET)
#define REACHED c_expr { now.goal == goals }
#else
#define EV(name) printf("@ %e %d\n", name, b)
#define REACHED false
#endif
#define ALL(x) (x(0) && x(N - 1))
#define ANY(x) (x(0) || x(N - 1))

/* -- one flow, as a batch of one: what is true of the world ------------------------------------------------ */

bit slive[N], tlive[N];   /* its socket is live in the source's pod, in the target's pod */
bit thawed[N];            /* went on at the source after its checkpoint was taken: the checkpoint is stale */
bit decided[N];           /* COMMIT was journalled once, whatever became of the journal */
bit excused[N];           /* a death took what the flow needed: it may be lost, by name */

/* -- source: journal, then memory -------------------------------------------------------------------------- */

mtype = { LIVE, HELD, SENT, SHIPPED, RESTORED_HEARD, COMMITTING, MOVED, ABORTING, THAWED, LOST };
bit sent[N], committed[N], aborted[N], released;
mtype phase[N];
bit stop;                 /* no further batch is begun */
bit followed;             /* Steer: the address was proved at the target, where flows are */

/* -- target: journal, then memory -------------------------------------------------------------------------- */

mtype = { NOTHING, PREPARED, RESTORING, RESTORED, ACTIVATING, ACTIVATED, DISCARDING, DISCARDED, FORGOTTEN };
bit restored[N], activated[N], discarded[N];
mtype state[N];

/* -- the machines and what is between them ----------------------------------------------------------------- */

bit sup = 1, tup = 1;     /* the agent runs */
bit spod = 1, tpod = 1;   /* the pod's serving process lives */
bit sdead, tdead;         /* the node died; its next boot knows nothing. True, and so can be proved */
bit ship[N], move[N], commit[N], discard[N], finish;    /* said by the source, not lost yet */
bit said_restored[N], said_moved[N], said_activated[N], said_discarded[N], said_lost[N], said_unknown[N];
                                                       /* by the target */
mtype = { AT_SOURCE, AT_TARGET };
mtype addr = AT_SOURCE;   /* where the network delivers the floating address */
mtype want = AT_SOURCE;   /* where it was last asked to be */

mtype = { /* rows of the table that are not also the name of a state */
	HOLD, SHIP, HEAR_RESTORED, COMMIT, SAY_COMMIT, HEAR_ACTIVATED, HEAR_LOST, HEAR_UNKNOWN, LOSE_TO_DEAD_TARGET, FAIL,
	SAY_DISCARD, TAKE_ADDRESS_BACK, THAW_NOTHING_SENT, THAW_DISCARDED, THAW_TARGET_GONE, BROKEN, RESTORE,
	REFUSE_SHIP, TAKE_ADDRESS, PROVE_ADDRESS, SOURCE_GONE, GO_LIVE, COMMIT_AGAIN, COMMIT_UNKNOWN, FORGET,
	DISCARD, DISCARD_AGAIN, REFUSE_DISCARD, SESSION_ENDED, ABORT, RELEASE, SOURCE_RESTARTS, TARGET_RESTARTS,
	MOVE_EARLY, MOVE_ADDRESS, FOLLOW, MOVE_BACK, ADDRESS_MOVED, LOSE, SOURCE_CRASHES, TARGET_CRASHES, SOURCE_DIES,
	TARGET_DIES, ADDRESS_REVERSED, TARGET_POD_GONE, BOTH_GONE,
	SOURCE_POD_DIES, TARGET_POD_DIES
};

#define BEFORE_COMMIT(b) (phase[b] == HELD || phase[b] == SENT || phase[b] == SHIPPED || phase[b] == RESTORED_HEARD)
#define ENDED(b) (phase[b] == MOVED || phase[b] == THAWED || phase[b] == LOST || phase[b] == LIVE && stop)
#define IS_MOVED(b) (phase[b] == MOVED)
#define AT_TARGET_FOR_GOOD(b) (decided[b] || tlive[b])
#if MUTANT == 14
#define MAY_GO true
#else
#define MAY_GO (!STEER || followed || tdead || !tpod || !ANY(IS_MOVED))
#endif

/* -- going live: the only two places where a flow can get an owner ------------------------------------------ */

inline thaw(b) {
	assert(!tlive[b]);             /* never two owners */
	assert(!decided[b]);           /* after COMMIT the source never thaws */
	assert(STEER || addr == AT_SOURCE || tdead);
	thawed[b] = 1;
	if
	:: spod -> slive[b] = 1; phase[b] = THAWED
	:: !spod -> phase[b] = LOST  /* nobody is there to serve it */
	fi
}

inline go_live(b) {
	assert(!slive[b]);             /* never two owners */
	assert(!tlive[b]);             /* nor one that is made live twice: its checkpoint is old by then */
	assert(decided[b] || sdead);   /* only on COMMIT, or with proof that the source's node is gone ... */
	assert(!thawed[b]);            /* ... and with a checkpoint that the source has not gone on from */
	assert(STEER || addr == AT_TARGET || sdead);
	tlive[b] = 1; state[b] = ACTIVATED
}

/* -- the source's agent (source_*.py) ----------------------------------------------------------------------- */

proctype Source(byte b) {
end:
	do
	:: atomic { sup && phase[b] == LIVE && !stop -> slive[b] = 0; phase[b] = HELD; EV(HOLD) }
	:: atomic { sup && phase[b] == HELD -> sent[b] = 1; phase[b] = SENT; EV(SENT) }
	:: atomic { sup && phase[b] == SENT -> ship[b] = 1; move[b] = !STEER; phase[b] = SHIPPED; EV(SHIP) }
	:: atomic { sup && phase[b] == SHIPPED && said_restored[b] -> phase[b] = RESTORED_HEARD; EV(HEAR_RESTORED) }
	:: atomic { sup && phase[b] == RESTORED_HEARD && (STEER || said_moved[b]) ->
		committed[b] = 1; decided[b] = 1; excused[b] = excused[b] || tdead || !tpod; phase[b] = COMMITTING; EV(COMMIT) }
	:: atomic { sup && phase[b] == COMMITTING && !commit[b] && !said_activated[b] && !said_lost[b] &&
		!said_unknown[b] && !tdead -> commit[b] = 1; EV(SAY_COMMIT) }
	:: atomic { sup && phase[b] == COMMITTING && said_activated[b] -> phase[b] = MOVED; EV(HEAR_ACTIVATED) }
	:: atomic { sup && phase[b] == COMMITTING && said_lost[b] -> phase[b] = LOST; EV(HEAR_LOST) }
	/* the target knows nothing of a job that was committed: never */
	:: atomic { sup && phase[b] == COMMITTING && said_unknown[b] -> assert(false); EV(HEAR_UNKNOWN) }
	:: atomic { sup && phase[b] == COMMITTING && tdead -> phase[b] = LOST; EV(LOSE_TO_DEAD_TARGET) }

	/* a step failed, or an answer did not come in time, or the user aborted: all the same from here */
	:: atomic { sup && BEFORE_COMMIT(b) -> aborted[b] = 1; stop = 1; phase[b] = ABORTING; EV(FAIL) }
	:: atomic { sup && phase[b] == ABORTING && sent[b] && !discard[b] && !said_discarded[b] && !tdead ->
		discard[b] = 1; EV(SAY_DISCARD) }
	:: atomic { sup && phase[b] == ABORTING && !STEER && want == AT_TARGET && (said_discarded[b] || tdead) ->
		want = AT_SOURCE; EV(TAKE_ADDRESS_BACK) }
	:: atomic { sup && phase[b] == ABORTING && !sent[b] -> thaw(b); EV(THAW_NOTHING_SENT) }
	:: atomic { sup && phase[b] == ABORTING && sent[b] && said_discarded[b] && (STEER || want == AT_SOURCE && addr == AT_SOURCE) ->
		thaw(b); EV(THAW_DISCARDED) }
	:: atomic { sup && phase[b] == ABORTING && sent[b] && tdead && (STEER || want == AT_SOURCE) ->
		thaw(b); EV(THAW_TARGET_GONE) }

#if MUTANT == 1 || MUTANT == 13
	:: atomic { sup && phase[b] == ABORTING && sent[b] -> thaw(b); EV(BROKEN) }
#elif MUTANT == 2
	:: atomic { sup && phase[b] == RESTORED_HEARD && (STEER || said_moved[b]) && !commit[b] -> commit[b] = 1; EV(BROKEN) }
#elif MUTANT == 5
	:: atomic { sup && phase[b] == COMMITTING -> aborted[b] = 1; phase[b] = ABORTING; EV(BROKEN) }
#elif MUTANT == 6
	:: atomic { sup && phase[b] == COMMITTING -> phase[b] = LOST; EV(BROKEN) }
#endif
	od
}

/* -- the target's agent (target.py) ------------------------------------------------------------------------- */

proctype Target(byte b) {
end:
	do
	:: atomic { tup && ship[b] && state[b] == PREPARED && tpod -> ship[b] = 0; state[b] = RESTORING; EV(RESTORE) }
	:: atomic { tup && ship[b] && (state[b] != PREPARED || !tpod) -> ship[b] = 0; EV(REFUSE_SHIP) }
	:: atomic { tup && state[b] == RESTORING ->
#if MUTANT != 7
		restored[b] = 1;
#endif
		state[b] = RESTORED; said_restored[b] = 1; EV(RESTORED) }
	:: atomic { tup && move[b] && state[b] == RESTORED && want == AT_SOURCE -> want = AT_TARGET; EV(TAKE_ADDRESS) }
	:: atomic { tup && move[b] && state[b] == RESTORED && addr == AT_TARGET && !said_moved[b] ->
		said_moved[b] = 1; EV(PROVE_ADDRESS) }

	:: atomic { tup && commit[b] && state[b] == RESTORED && tpod -> activated[b] = 1; state[b] = ACTIVATING; EV(ACTIVATED) }
	:: atomic { tup && sdead && state[b] == RESTORED && tpod -> activated[b] = 1; state[b] = ACTIVATING; EV(SOURCE_GONE) }
	:: atomic { tup && state[b] == ACTIVATING && tpod -> go_live(b); said_activated[b] = !sdead; EV(GO_LIVE) }
	:: atomic { tup && commit[b] && state[b] == ACTIVATED && !said_activated[b] && !sdead ->
		said_activated[b] = 1; EV(COMMIT_AGAIN) }
	:: atomic { tup && commit[b] && !said_unknown[b] && !sdead && !released &&
		(state[b] == NOTHING || state[b] == FORGOTTEN) ->
		said_unknown[b] = 1; EV(COMMIT_UNKNOWN) }
	/* the pod has gone, and its sockets with it: said, so that the job ends */
	:: atomic { tup && commit[b] && !tpod && !said_lost[b] && !sdead && (state[b] == RESTORED || state[b] == ACTIVATING) ->
#if MUTANT == 11
		commit[b] = 0;
#else
		said_lost[b] = 1;
#endif
		EV(TARGET_POD_GONE) }
	:: atomic { tup && sdead && !tpod && (state[b] == RESTORED || state[b] == ACTIVATING) ->
		restored[b] = 0; activated[b] = 0; state[b] = FORGOTTEN; EV(BOTH_GONE) }
	:: atomic { tup && finish && (state[b] == ACTIVATED || state[b] == RESTORED || state[b] == ACTIVATING) ->
		assert(state[b] == ACTIVATED || !tpod);
		restored[b] = 0; activated[b] = 0; state[b] = FORGOTTEN; EV(FORGET) }

	:: atomic { tup && discard[b] && (state[b] == NOTHING || state[b] == PREPARED || state[b] == RESTORED) ->
		discarded[b] = restored[b]; state[b] = DISCARDING; EV(DISCARD) }
	:: atomic { tup && state[b] == DISCARDING ->
		restored[b] = 0; discarded[b] = 0; state[b] = DISCARDED; said_discarded[b] = !sdead; EV(DISCARDED) }
	:: atomic { tup && discard[b] && state[b] == DISCARDED && !said_discarded[b] && !sdead ->
		said_discarded[b] = 1; EV(DISCARD_AGAIN) }
	/* said before the source's node died, and late */
	:: atomic { tup && discard[b] && state[b] == ACTIVATED -> assert(sdead); discard[b] = 0; EV(REFUSE_DISCARD) }
	/* nothing was journalled, and whoever asked has gone: the session has ended */
	:: atomic { tup && (state[b] == PREPARED || state[b] == RESTORING) && (!sup || released || phase[b] == ABORTING) ->
		state[b] = DISCARDED; EV(SESSION_ENDED) }

#if MUTANT == 3 || MUTANT == 13
	:: atomic { tup && state[b] == RESTORED -> activated[b] = 1; state[b] = ACTIVATING; EV(BROKEN) }
#elif MUTANT == 8
	:: atomic { tup && discard[b] && state[b] == RESTORED && !said_discarded[b] -> said_discarded[b] = 1; EV(BROKEN) }
#endif
	od
}

/* -- what belongs to the job, the operator and the network (jobs.py) ---------------------------------------- */

proctype Job() {
	byte b;
end:
	do
	:: atomic { sup && !stop && !released -> stop = 1; EV(ABORT) }
	:: atomic { sup && !released && ALL(ENDED) && MAY_GO -> released = 1; finish = !tdead; EV(RELEASE) }
#if MUTANT == 9
	:: atomic { sup && !released && !finish && !tdead && ALL(IS_MOVED) -> finish = 1; EV(BROKEN) }
#endif
	:: atomic { !sup && !sdead -> sup = 1; EV(SOURCE_RESTARTS) }
#if MUTANT == 10
	:: atomic { !sup && !sdead && !spod && !released -> sup = 1; released = 1; stop = 1;
		for (b : 0 .. N - 1) { phase[b] = (phase[b] == MOVED -> MOVED : LOST) }; b = 0; EV(BROKEN) }
#endif
	:: atomic { !tup && !tdead -> tup = 1; EV(TARGET_RESTARTS) }

	/* Steer: the address moves beside the batches, from the first hold at the earliest; back when none was committed */
	:: atomic { STEER && sup && want == AT_SOURCE && ANY(BEFORE_COMMIT) && !tdead && tpod ->
		want = AT_TARGET; EV(MOVE_EARLY) }
	:: atomic { (STEER && !released || sdead) && want == AT_SOURCE && ANY(AT_TARGET_FOR_GOOD) && !tdead && tpod ->
		want = AT_TARGET; EV(MOVE_ADDRESS) }
	:: atomic { STEER && sup && tup && !released && !followed && ALL(ENDED) && ANY(IS_MOVED) &&
		want == AT_TARGET && addr == AT_TARGET && tpod ->
		followed = 1; EV(FOLLOW) }
	:: atomic { STEER && sup && want == AT_TARGET &&
		(tdead || !tpod || !ANY(BEFORE_COMMIT) && !ANY(AT_TARGET_FOR_GOOD)) -> want = AT_SOURCE; EV(MOVE_BACK) }
	:: atomic { addr != want -> addr = want; EV(ADDRESS_MOVED) }
	od
}

/* -- faults ------------------------------------------------------------------------------------------------- */

inline forget_answers(b) {
	said_restored[b] = 0; said_moved[b] = 0; said_activated[b] = 0;
	said_discarded[b] = 0; said_lost[b] = 0; said_unknown[b] = 0
}

inline recover_source(b) { /* jobs.py: back before COMMIT, forward after it */
	forget_answers(b);
	if
	:: released -> skip
	:: !released && committed[b] -> phase[b] = COMMITTING
	:: !released && !committed[b] && (sent[b] || aborted[b] || !slive[b]) -> aborted[b] = 1; phase[b] = ABORTING
	:: else -> skip
	fi;
#if MUTANT == 4
	if :: phase[b] == ABORTING -> sent[b] = 0 :: else fi
#endif
}

inline recover_target(b) {
	ship[b] = 0; move[b] = 0; commit[b] = 0; discard[b] = 0;
	if
	:: discarded[b] -> state[b] = DISCARDING
	:: !discarded[b] && activated[b] && tlive[b] && MUTANT != 12 -> state[b] = ACTIVATED
	:: !discarded[b] && restored[b] && !(activated[b] && tlive[b] && MUTANT != 12) -> state[b] = RESTORED
	:: else -> state[b] = NOTHING
	fi
}

inline source_dies(b) {
	excused[b] = excused[b] || aborted[b] || discarded[b] || !restored[b] && !tlive[b] || !tpod;
	slive[b] = 0; sent[b] = 0; committed[b] = 0; aborted[b] = 0; phase[b] = LOST;
	forget_answers(b)
}

inline target_dies(b) {
	excused[b] = excused[b] || decided[b] || sdead;
	tlive[b] = 0; restored[b] = 0; activated[b] = 0; discarded[b] = 0; state[b] = NOTHING;
	ship[b] = 0; move[b] = 0; commit[b] = 0; discard[b] = 0
}

inline source_pod_dies(b) {
	excused[b] = excused[b] || !decided[b];
	if
	:: slive[b] -> slive[b] = 0; phase[b] = (phase[b] == ABORTING -> ABORTING : LOST)
	:: else -> skip
	fi
}

inline target_pod_dies(b) {
	excused[b] = excused[b] || decided[b] || sdead;
	tlive[b] = 0
}

inline lose(message) { atomic { message -> message = 0; EV(LOSE) } }

proctype Faults() {
	byte b;
progress_storm:
	do
	:: atomic { sup -> sup = 0; followed = 0; if :: stop = 1 :: STEER -> skip fi;
		for (b : 0 .. N - 1) { recover_source(b) }; b = 0; EV(SOURCE_CRASHES) }
	:: atomic { tup -> tup = 0; finish = 0;
		for (b : 0 .. N - 1) { recover_target(b) }; b = 0; EV(TARGET_CRASHES) }
	:: atomic { !sdead -> sdead = 1; sup = 0; for (b : 0 .. N - 1) { source_dies(b) }; b = 0; EV(SOURCE_DIES) }
	:: atomic { !tdead -> tdead = 1; tup = 0; finish = 0;
		for (b : 0 .. N - 1) { target_dies(b) }; b = 0; EV(TARGET_DIES) }
	:: atomic { STEER && addr == AT_TARGET -> addr = AT_SOURCE; EV(ADDRESS_REVERSED) }
	:: atomic { spod && !sdead -> spod = 0; for (b : 0 .. N - 1) { source_pod_dies(b) }; b = 0; EV(SOURCE_POD_DIES) }
	:: atomic { tpod && !tdead -> tpod = 0; for (b : 0 .. N - 1) { target_pod_dies(b) }; b = 0; EV(TARGET_POD_DIES) }
	:: lose(finish)
	:: lose(ship[0]) :: lose(commit[0]) :: lose(discard[0]) :: lose(said_restored[0]) :: lose(said_activated[0])
	:: lose(said_discarded[0]) :: lose(said_lost[0])
#ifdef WAIT
	:: lose(move[0]) :: lose(said_moved[0])
#elif N == 2
	:: lose(ship[1]) :: lose(commit[1]) :: lose(discard[1]) :: lose(said_restored[1]) :: lose(said_activated[1])
	:: lose(said_discarded[1]) :: lose(said_lost[1])
#endif
	:: break
	od
}

/* -- when faults have ended and nothing can happen any more ------------------------------------------------- */

inline judge(b) {
	if
	:: slive[b] -> assert(!tlive[b] && phase[b] != LOST); assert(addr == AT_SOURCE || STEER && !tdead)
	:: tlive[b] -> assert(!slive[b]); assert(phase[b] == MOVED || sdead); assert(addr == AT_TARGET)
	:: !slive[b] && !tlive[b] ->  /* never none for ever: lost by name, or moved before the target died */
		assert(excused[b] && (phase[b] == LOST || phase[b] == MOVED && (tdead || !tpod)))
	fi;
	assert(state[b] != PREPARED && (state[b] != RESTORED || !tpod))  /* nothing stays held for nobody */
}

proctype Judge() {
	timeout ->
	assert(released || sdead);
	judge(0);
	judge(N - 1);
	assert(!REACHED)
}

init {
	byte b;
	atomic {
		for (b : 0 .. N - 1) {
			phase[b] = LIVE; slive[b] = 1; state[b] = PREPARED;
			run Source(b); run Target(b)
		};
		run Job(); run Faults(); run Judge()
	}
}

/* Negative controls: each breaks one rule, and spin must find what comes of it (tests/unit/test_ownership_model.py).
 *
 *   1  the source thaws without the target's word that it discarded
 *   2  COMMIT is said before it is journalled
 *   3  the target takes silence for the source's death
 *   4  a restarted source forgets SENT
 *   5  a job is aborted after COMMIT
 *   6  the source takes silence for the target's death, after COMMIT
 *   7  RESTORED is said and not journalled
 *   8  the target confirms a discard that it has yet to do
 *   9  the target is told to forget before RELEASED is journalled
 *  10  a restarted source whose pod has gone gives the job up, whatever it had said
 *  11  a target whose pod has gone asks to be told again, for ever
 *  12  a restarted target takes ACTIVATED for RESTORED
 *  13  each takes the other's silence for its death
 *  14  by Steer the source lets go before the address is proved at the target
 */
