// xen-api of 2019: event.from with "*" and an empty token, results as they are.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { auth, cached, content, failure, plan, sized, sleep, unsized } from './lib.mjs'

const { createClient } = createRequire(import.meta.url)('xen-api-2019')
const { patches } = plan
const xapi = createClient({ url: plan.url, auth, allowUnauthorized: true })
await xapi.connect()

await cached(xapi, o => o.$type === 'host')
const refs = {}
for (const [name, body] of [['buffer', content('buffer')], ['sized', sized('sized')], ['unsized', unsized('unsized')]]) {
  const result = await xapi.putResource(body, '/pool_patch_upload/', { task: true })
  const record = await cached(xapi, o => o.$type === 'pool_patch' && o.uuid === patches[name].uuid)
  assert.equal(result, `<value>${record.$ref}</value>`)
  refs[name] = record.$ref
}
const error = await failure(xapi.putResource(content('buffer'), '/pool_patch_upload/'))
assert.deepEqual([error.code, error.params], ['PATCH_ALREADY_EXISTS', [patches.buffer.uuid]])

await xapi.call('pool_patch.apply', refs.buffer, xapi.pool.master)
await xapi.callAsync('pool_patch.pool_apply', refs.sized)
await cached(xapi, o => o.$type === 'host_patch' && o.pool_patch === refs.sized && o.applied)
await xapi.barrier()

// the tasks are gone here and there, or the client asks for them all the time
const call = xapi._sessionCall
let asked = 0
xapi._sessionCall = function (method, ...rest) {
  asked += method === 'task.get_all_records'
  return call.call(this, method, ...rest)
}
for (let i = 0; i < 3; ++i) {
  await xapi.call('event.inject', 'pool', xapi.pool.$ref)
  await sleep(300)
}
assert.equal(asked, 0)

// It takes the end of its session for an accident and logs in again, so it does
// not end by itself.
await xapi.disconnect()
console.log('ok')
process.exit()
