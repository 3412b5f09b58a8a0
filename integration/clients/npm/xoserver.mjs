// The calls with which Xen Orchestra's server installs a classic patch.
import assert from 'node:assert/strict'
import { assertWatching, cached, connected, plan, sized } from './lib.mjs'

const xapi = await connected({ syncStackTraces: true })
const { uuid } = plan.patches.legacy
const host = xapi.pool.$master

// the system of before pool_update, by its own test
const version = host.software_version.platform_version.split('.').map(Number)
assert.equal(version[0] < 2 || (version[0] === 2 && (version[1] < 1 || (version[1] === 1 && version[2] < 1))), true)
assert.notEqual(host.software_version.product_brand, 'XCP-ng')

assert.equal(xapi.getObjectByUuid(uuid, undefined), undefined)
const task = await xapi.createTask('Patch upload', 'a legacy patch')
const ref = await xapi.putResource(sized('legacy'), '/pool_patch_upload', { task })
assert.equal((await cached(xapi, o => o.$ref === ref)).uuid, uuid)

// tools ISOs are looked for among the virtual machines' drives
assert.deepEqual(Object.values(xapi.objects.indexes.type.VBD ?? {}), [])

assert.equal(await xapi.call('pool_patch.pool_apply', ref), '')
await xapi.barrier()

// the list of what is installed
const installed = xapi.getObjectByRef(host.$ref).$patches.map(_ => _.$pool_patch.uuid)
assert.deepEqual(installed, [uuid])

await assertWatching(xapi)
await xapi.disconnect()
console.log('ok')
