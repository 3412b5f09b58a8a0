// What the flows share: the plan that the Go test wrote, a count of the calls
// that the client sends, and a client that has fetched everything.
import { readFileSync } from 'node:fs'
import { channel } from 'node:diagnostics_channel'
import { Readable } from 'node:stream'
import { createReadStream, statSync } from 'node:fs'
import { createClient } from 'xen-api'

// plan: {url, transport, debounce, user, password, patches: {name: {file, uuid}}}
export const plan = JSON.parse(readFileSync(process.argv[2], 'utf8'))

export const auth = { user: plan.user, password: plan.password }

// calls counts the RPCs on the wire by method; the client is not touched, its
// HTTP library announces each request.
export const calls = {}
channel('undici:request:create').subscribe(({ request }) => {
  const body = String(request.body ?? '')
  const name = /"method":"([^"]+)"/.exec(body) ?? /<methodName>([^<]+)</.exec(body)
  if (name !== null) calls[name[1]] = (calls[name[1]] ?? 0) + 1
})

export const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))

export async function connected(options) {
  const xapi = createClient({
    url: plan.url,
    auth,
    allowUnauthorized: true,
    transport: plan.transport,
    debounce: plan.debounce,
    ...options,
  })
  await xapi.connect()
  await xapi.objectsFetched
  return xapi
}

export const content = name => readFileSync(plan.patches[name].file)

// A stream whose length the client knows.
export function sized(name) {
  const { file } = plan.patches[name]
  return Object.assign(createReadStream(file), { length: statSync(file).size })
}

// A stream of unknown length, in odd pieces.
export function unsized(name) {
  const bytes = content(name)
  return Readable.from(
    (function* () {
      for (let i = 0; i < bytes.length; i += 7777) yield bytes.subarray(i, i + 7777)
    })(),
    { objectMode: false }
  )
}

// A stream of unknown length that is no patch from its first byte on, and goes
// on for so many ms.
export function endless(ms) {
  return Readable.from(
    (async function* () {
      for (const end = Date.now() + ms; Date.now() < end; await sleep(10)) yield Buffer.alloc(100_000, 'x')
    })(),
    { objectMode: false }
  )
}

// The error of a promise that is to be rejected.
export function failure(promise) {
  return promise.then(
    value => {
      throw new Error(`succeeded with ${JSON.stringify(value)}`)
    },
    error => error
  )
}

// Waits for an object of the client's cache, which only events fill.
export async function cached(xapi, find) {
  for (let i = 0; i < 500; ++i) {
    const object = Object.values(xapi.objects.all).find(find)
    if (object !== undefined) return object
    await sleep(20)
  }
  throw new Error('no event brought the object')
}

// The event loop works, waits for events instead of asking again and again,
// and agrees with the server on the number of tasks.
export async function assertWatching(xapi) {
  await xapi.barrier()
  if (xapi.watchEventsError !== undefined) throw xapi.watchEventsError
  await sleep(500) // the barrier's own clearing up
  const before = { ...calls }
  await sleep(1500)
  const since = method => (calls[method] ?? 0) - (before[method] ?? 0)
  if (since('event.from') > 2 || since('task.get_all_records') > 0) {
    throw new Error(`when nothing happens: ${since('event.from')} event.from, ${since('task.get_all_records')} task.get_all_records`)
  }
  if (calls['task.get_all_records'] > 3) {
    throw new Error(`task.get_all_records was called ${calls['task.get_all_records']} times`)
  }
  await xapi.barrier()
}
