// SPDX-License-Identifier: Apache-2.0
/*
 * note.c - what a hold's note means for a checkpoint.
 *
 * A note is written while the flow is absorbed, partly before the checkpoint was
 * taken: nothing in it is trusted to fit. What does not is ignored, as the client
 * sends it again.
 */
#include "internal.h"

static void view_data(struct note_view *v, const struct flow *f, const struct ms_flow_note *note)
{
	uint32_t end = ms_rcv_end(f), skip = end - note->data_seq;
	uint32_t len = note->flags & MS_NOTE_DATA ? note->data_len : 0;

	if (ms_fin_in(f) || len > MS_NOTE_DATA_MAX || skip > len)
		return; /* the stream has ended, or a gap, or all of it known already */
	v->data = note->data + skip;
	v->data_len = len - skip;
	v->fin = note->flags & MS_NOTE_FIN;
}

struct note_view ms_note_view(const struct flow *f, const struct ms_flow_note *note)
{
	struct note_view v = {.ack = ms_una(f), .window = f->win.snd_wnd >> f->snd_wscale};

	if (v.window > 65535)
		v.window = 65535;
	if (!note)
		return v;
	v.rst = note->flags & MS_NOTE_RST ||
		(note->flags & MS_NOTE_RST_SEEN && note->rst_seq == f->rcv_nxt);
	if (note->flags & (MS_NOTE_DATA | MS_NOTE_FIN))
		view_data(&v, f, note);
	if (!(note->flags & MS_NOTE_SEG) || ms_before(note->ack, v.ack) ||
	    ms_before(f->write_seq, note->ack))
		return v;
	v.segment = true;
	v.ack = note->ack;
	v.window = note->window & 0xffff;
	v.timestamps = note->flags & MS_NOTE_TS && f->tcpi_options & TCPI_OPT_TIMESTAMPS;
	v.tsval = note->tsval;
	v.tsecr = note->tsecr;
	return v;
}
