// Package upload serves what goes over HTTP as bytes and not as calls:
//
//	PUT /pool_patch_upload     a signed patch becomes a VDI and a pool_patch
//	/pool_patch_uploads        the same, resumable: tus 1.0 (docs/resumable-upload.md)
//	GET /pool_patch_download   the classic patch file of the coordinator
//	GET /pool_patch_chunks     the chunks of a patch, for deltas to it (docs/delta.md)
//	PUT /import_raw_vdi        the content of a VDI, a new or an existing one
//	GET /export_raw_vdi        the content of a VDI: whole, its data, or some blocks
//	GET /vdi_block_map         the block map of a VDI
//
// # Life of a request
//
// The caller is known by session, pool secret or Basic. The request runs as a
// task: the client's own (task_id) or one made here. The work goes on under the
// task's context, never under the request's: a client that goes away after its
// last byte changes nothing, task.cancel ends the work even while the client
// still sends.
//
// With task_id the status is 200 at once, before a byte of the body is read, for
// that is what xe and XenCenter wait for; the outcome is the task's. Without it
// the status comes after the work, and is true: 201 with the record, or the
// status of the error (outcomes in reply.go) with {code, params, message}.
//
// # Resumable uploads
//
// A resumable upload is a draft of the pool, a task and a log. While requests
// bring bytes it is live: a goroutine (run) drives the same pipeline as a PUT,
// and reads the body of whichever request is at work. When none is for a while it
// is parked; a run that begins reads again, from image and log, what came before.
//
// # What is refused
//
// A body that ends before its length says so, but for the length 1 PiB with
// which xen-api announces a stream of unknown length; a body that stalls; bytes
// that no trusted key has signed; and everything when there is no room for it. A
// request that fails leaves nothing. Memory does not grow with the size.
package upload
