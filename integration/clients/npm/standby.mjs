// xen-api pointed at a host that does not lead: it follows HOST_IS_SLAVE, and
// what it sends to such a host follows the redirect.
import assert from 'node:assert/strict'
import { cached, calls, connected, content, plan, sized, unsized } from './lib.mjs'

const { patches, extra } = plan
const UPLOAD = '/pool_patch_upload/'
const xapi = await connected()
const { pool } = xapi
assert.equal(calls['session.login_with_password'], 2)
assert.equal(pool.$master.address, extra.leader)

const standby = Object.values(xapi.objects.all).find(o => o.$type === 'host' && o.address === extra.standby)
assert.notEqual(standby.$ref, pool.master)
for (const [name, body] of [
  ['sized', sized('sized')],
  ['unsized', unsized('unsized')],
  ['buffer', content('buffer')],
]) {
  // a buffer is sent without a probe: only to the leader
  const host = name === 'buffer' ? undefined : standby
  const ref = await xapi.putResource(body, UPLOAD, { host })
  const record = await cached(xapi, o => o.$type === 'pool_patch' && o.uuid === patches[name].uuid)
  assert.equal(record.$ref, ref)
  assert.equal(record.$VDI.$SR.$ref, pool.default_SR)
}

// a download, too
const { $VDI } = xapi.getObjectByUuid(patches.buffer.uuid)
const image = await xapi.getResource('/export_raw_vdi/', { host: standby, query: { vdi: $VDI.$ref, format: 'raw' } })
let size = 0
for await (const chunk of image.body ?? image) size += chunk.length
assert.equal(String(size), $VDI.virtual_size)

await xapi.disconnect()
console.log('ok')
