// xen-api does everything that can be done with a patch.
import assert from 'node:assert/strict'
import { CancelToken } from 'promise-toolbox'
import { assertWatching, cached, calls, connected, content, endless, failure, plan, sized, unsized } from './lib.mjs'

const { patches } = plan
const UPLOAD = '/pool_patch_upload/'
const xapi = await connected()
const { pool } = xapi
const host = pool.master

assert.equal(pool.$default_SR.type, 'file')
assert.equal(pool.$master.software_version.platform_version, '2.1.0')
for (const type of ['pool_patch', 'host_patch', 'task', 'SR', 'VDI', 'SM', 'PBD', 'host', 'pool', 'message', 'VM', 'VBD', 'network']) {
  assert.equal(calls[`${type}.get_all_records`] >= 1, true, type)
}
assert.equal(calls['pool_update.get_all_records'], undefined)

// three kinds of uploads
const refs = {}
for (const [name, body] of [
  ['buffer', content('buffer')],
  ['sized', sized('sized')],
  ['unsized', unsized('unsized')],
  ['slow', content('slow')],
]) {
  refs[name] = await xapi.putResource(body, UPLOAD)
  assert.match(refs[name], /^OpaqueRef:[0-9a-f-]{36}$/)
  const record = await cached(xapi, o => o.$type === 'pool_patch' && o.uuid === patches[name].uuid)
  assert.equal(record.$ref, refs[name])
  assert.equal(record.pool_applied, false)
  assert.equal(record.$VDI.$SR.$ref, pool.default_SR)
  assert.equal((await xapi.getRecordByUuid('pool_patch', patches[name].uuid)).$ref, refs[name])
}
const virtualSize = name => xapi.getObjectByRef(refs[name]).$VDI.virtual_size
assert.equal(virtualSize('buffer'), String(4 << 20))
assert.equal(virtualSize('sized'), String(4 << 20))
assert.equal(virtualSize('unsized'), String(4 * 2 ** 30))

// refusals reach the caller, and the event loop lives on
for (const [name, body] of [['buffer', content('buffer')], ['buffer', sized('buffer')], ['unsized', unsized('unsized')]]) {
  const exists = await failure(xapi.putResource(body, UPLOAD))
  assert.deepEqual([exists.code, exists.params], ['PATCH_ALREADY_EXISTS', [patches[name].uuid]])
}
for (const body of [content('unsigned'), sized('unsigned'), unsized('unsigned'), endless(3000), Buffer.alloc(0)]) {
  const invalid = await failure(xapi.putResource(body, UPLOAD))
  assert.deepEqual([invalid.code, invalid.params], ['INVALID_PATCH', []])
}

// precheck and apply, waiting for the call and for a task
assert.equal(await xapi.call('pool_patch.precheck', refs.buffer, host), 'checked <ok> & "fine"\n')
assert.equal(await xapi.callAsync('pool_patch.precheck', refs.buffer, host), 'checked <ok> & "fine"\n')
assert.equal(await xapi.call('pool_patch.apply', refs.buffer, host), 'applied buffer\n')
assert.equal(await xapi.callAsync('pool_patch.apply', refs.sized, host), 'applied sized\n')
assert.equal(await xapi.callAsync('pool_patch.pool_apply', refs.unsized), '')
for (const name of ['buffer', 'sized', 'unsized']) {
  await xapi.barrier()
  const record = xapi.getObjectByRef(refs[name])
  assert.equal(record.pool_applied, true)
  const [applied] = record.$host_patches
  assert.deepEqual([applied.applied, applied.$host.$ref, applied.$pool_patch.$ref], [true, host, refs[name]])
  assert.equal(pool.$master.patches.length, xapi.getObjectByRef(host).$patches.length)
}
let error = await failure(xapi.call('pool_patch.apply', refs.buffer, host))
assert.deepEqual([error.code, error.params], ['PATCH_ALREADY_APPLIED', [refs.buffer]])
error = await failure(xapi.callAsync('pool_patch.apply', refs.buffer, host))
assert.deepEqual([error.code, error.params], ['PATCH_ALREADY_APPLIED', [refs.buffer]])
error = await failure(xapi.callAsync('pool_patch.destroy', refs.buffer))
assert.deepEqual([error.code, error.params], ['PATCH_IS_APPLIED', []])

// an apply that is cancelled
const { cancel, token } = CancelToken.source()
const running = failure(xapi.callAsync(token, 'pool_patch.apply', refs.slow, host))
await cached(xapi, o => o.$type === 'host_patch' && o.pool_patch === refs.slow)
cancel()
assert.match(String((await running).message), /cancel/)
await xapi.barrier()
assert.deepEqual(xapi.getObjectByRef(refs.slow).host_patches, [])

// fields
await xapi.setFieldEntry('pool_patch', refs.buffer, 'other_config', 'note', 'one')
await xapi.setFieldEntry('pool_patch', refs.buffer, 'other_config', 'note', 'two <&> \u00e9 \u{1f600}')
await xapi.setFieldEntry('pool_patch', refs.buffer, 'other_config', 'gone', 'x')
await xapi.setFieldEntry('pool_patch', refs.buffer, 'other_config', 'gone', null)
let patch = await xapi.barrier(refs.buffer)
assert.equal(patch.other_config.note, 'two <&> \u00e9 \u{1f600}')
assert.equal('gone' in patch.other_config, false)
await pool.set_name_label('a pool')
await pool.update_other_config({ one: '1', two: '2' })
assert.equal((await xapi.barrier(pool.$ref)).name_label, 'a pool')

// a raw disk goes in and out again
const raw = Buffer.alloc(1 << 20, 'raw bytes ')
const vdi = await xapi.call('VDI.create', {
  name_label: 'raw', name_description: '', SR: pool.default_SR, virtual_size: raw.length,
  type: 'user', sharable: false, read_only: false, other_config: {}, tags: [],
})
await xapi.putResource(raw, '/import_raw_vdi/', { query: { format: 'raw', vdi } })
const { body, task } = await xapi.getResource('/export_raw_vdi/', { query: { format: 'raw', vdi }, task: true })
assert.equal(Buffer.from(await body.arrayBuffer()).equals(raw), true)
await task
await xapi.callAsync('VDI.destroy', vdi)

// a session that ended: a new login, everything is fetched again. Over XML-RPC
// the client trips over itself: it formats a call without a session.
if (plan.transport === 'json-rpc') {
  const { sessionId } = xapi
  await xapi._call('session.logout', [sessionId])
  assert.equal(await xapi.getField('pool', pool.$ref, 'name_label'), 'a pool')
  assert.notEqual(xapi.sessionId, sessionId)
  await xapi.barrier()
}

// cleaning and destroying
patch = xapi.getObjectByRef(refs.buffer)
await xapi.call('pool_patch.clean', refs.buffer)
await xapi.call('pool_patch.clean_on_host', refs.buffer, host)
assert.equal((await xapi.barrier(refs.buffer)).VDI, patch.VDI)
await xapi.callAsync('pool_patch.pool_clean', refs.buffer)
assert.equal((await xapi.barrier(refs.buffer)).VDI, 'OpaqueRef:NULL')
assert.equal(xapi.getObjectByRef(patch.VDI, undefined), undefined)
await xapi.call('VDI.destroy', xapi.getObjectByRef(refs.sized).VDI)
assert.equal((await xapi.barrier(refs.sized)).VDI, 'OpaqueRef:NULL')
await xapi.callAsync('pool_patch.destroy', refs.slow)
await xapi.barrier()
assert.equal(xapi.getObjectByRef(refs.slow, undefined), undefined)
error = await failure(xapi.getRecordByUuid('pool_patch', patches.slow.uuid))
assert.deepEqual([error.code, error.params], ['UUID_INVALID', ['pool_patch', patches.slow.uuid]])

// the same patch again: it was cleaned, so it takes its old place
assert.equal(await xapi.putResource(sized('buffer'), UPLOAD), refs.buffer)

await assertWatching(xapi)
await xapi.disconnect()
console.log('ok', JSON.stringify(calls))
