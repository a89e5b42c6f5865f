-- What the replicas decide together: each command below is atomic, and its time is this server's.
--
-- KEYS[1] is the first part of every key. ARGV has a command, the settings, and the command's own
-- arguments. Times are whole microseconds.
--
-- PREFIX:state      since when this data is kept, what Discord allows, the number of keys
-- PREFIX:windows    by rate limit key, when it opens; a claimed one opens when its lease ends
-- PREFIX:claims     by rate limit key, the token of its claim
-- PREFIX:heads:*    by replica, when its first ticket came and when it asks again
-- PREFIX:starts     the day's session starts: their tokens by time
-- PREFIX:shard:N    the same of one shard, in the last hour

local HOUR = 3600 * 1000000
local DAY = 24 * HOUR
local FIRST_DELAY, LONGEST_DELAY = 15 * 1000000, 600 * 1000000

local command = ARGV[1]
local window, lease, grace, glance, in_flight, limit, usual_total, free_starts =
  tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]),
  tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local arguments = {unpack(ARGV, 10, 16)}

local function name(...)
  return table.concat({KEYS[1], ...}, ':')
end

local state, windows, claims, starts = name('state'), name('windows'), name('claims'), name('starts')

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local function expire(key, after)
  redis.call('PEXPIRE', key, math.ceil(after / 1000))
end

-- What a server has lost, or has noted by a clock that was set back since, begins anew, and the
-- replicas see that it does.
local since, last = unpack(redis.call('HMGET', state, 'since', 'last'))
if not last or now < tonumber(last) then
  redis.call('DEL', state, windows, claims, starts)
  since = string.format('%.0f', now)
end
redis.call('HSET', state, 'since', since, 'last', now)
expire(state, 2 * DAY)

-- Session starts of the day: used, total (-1: no limit is known), until some are free again.
local function budget()
  local total, remaining, resets_at, asked_at = unpack(
    redis.call('HMGET', state, 'total', 'remaining', 'resets_at', 'asked_at'))
  if total then
    total, remaining, resets_at, asked_at =
      tonumber(total), tonumber(remaining), tonumber(resets_at), tonumber(asked_at)
    while now >= resets_at do
      remaining, asked_at, resets_at = total, resets_at, resets_at + DAY
      redis.call('HSET', state, 'remaining', remaining, 'asked_at', asked_at, 'resets_at', resets_at)
    end
    redis.call('ZREMRANGEBYSCORE', starts, '-inf', asked_at - in_flight)
    return total - remaining + redis.call('ZCARD', starts), total, resets_at - now
  end
  redis.call('ZREMRANGEBYSCORE', starts, '-inf', now - DAY)
  if limit <= 0 then
    redis.call('ZREMRANGEBYRANK', starts, 0, -usual_total - 1)
  end
  local first = redis.call('ZRANGE', starts, 0, 0, 'WITHSCORES')[2]
  local resets_in = first and first + DAY - now or DAY
  return redis.call('ZCARD', starts), limit > 0 and limit or -1, resets_in
end

local function answer(verdict, wait)
  local used, total, resets_in = budget()
  local is_discords = redis.call('HEXISTS', state, 'total')
  return {verdict, wait, now, tonumber(since), used, total, resets_in, is_discords}
end

local GRANTED, KEY_CLOSED, SHARD_HELD = 0, 1, 2

local function greatest_common_divisor(a, b)
  while b > 0 do
    a, b = b, a % b
  end
  return a
end

-- When a key opens. Replicas may know different numbers of keys for a while: then a closed window
-- counts for every key that some shard may have besides.
local function opens_at(max_concurrency, key)
  local seen, mixed_until = unpack(redis.call('HMGET', state, 'max_concurrency', 'mixed_until'))
  mixed_until = tonumber(mixed_until or 0)
  if seen ~= max_concurrency then
    mixed_until = now + lease
    redis.call('HSET', state, 'max_concurrency', max_concurrency, 'mixed_until', mixed_until)
  end
  if now >= mixed_until then
    return tonumber(redis.call('HGET', windows, max_concurrency .. ':' .. key) or 0)
  end
  local latest, closed = 0, redis.call('HGETALL', windows)
  for i = 1, #closed, 2 do
    local other_number, other_key = closed[i]:match('(%d+):(%d+)')
    local shared = greatest_common_divisor(tonumber(other_number), tonumber(max_concurrency))
    if (other_key - key) % shared == 0 then
      latest = math.max(latest, tonumber(closed[i + 1]))
    end
  end
  return latest
end

local function close(field, until_when)
  redis.call('HSET', windows, field, until_when)
  expire(windows, lease)
end

-- A shard that starts too often has to wait.
local function shard_wait(shard)
  if free_starts == 0 or shard == '' then
    return 0
  end
  local key = name('shard', shard)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - HOUR)
  redis.call('ZREMRANGEBYSCORE', key, now + 1, '+inf') -- by a clock that was set back since
  local recent = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  local excess = #recent / 2 - free_starts
  if excess < 0 then
    return 0
  end
  local delay = math.min(FIRST_DELAY * 2 ^ excess, LONGEST_DELAY)
  return math.max(0, math.min(recent[#recent] + delay, recent[2] + HOUR) - now)
end

local function count_start(token, shard, at)
  redis.call('ZADD', starts, at, token)
  expire(starts, 2 * DAY)
  if free_starts > 0 and shard ~= '' then
    redis.call('ZADD', name('shard', shard), at, token)
    expire(name('shard', shard), HOUR)
  end
end

local function heads_of(max_concurrency, key)
  return name('heads', since, max_concurrency, key)
end

-- How long an older first ticket of another replica goes before. A replica that does not ask
-- when it should is forgotten soon after.
local function wait_for_older(heads, replica, came_at)
  local wait, others = 0, redis.call('HGETALL', heads)
  for i = 1, #others, 2 do
    local its_came_at, asks_at = others[i + 1]:match('(%d+) (%d+)')
    local is_here = now <= asks_at + grace
    if others[i] ~= replica and is_here and tonumber(its_came_at) < came_at then
      wait = math.max(wait, asks_at + grace - now)
    end
  end
  return math.min(wait, glance)
end

local commands = {}

function commands.claim(max_concurrency, key, shard, token, replica, came_at)
  local held = shard_wait(shard)
  if held > 0 then
    return answer(SHARD_HELD, held)
  end
  local field, heads = max_concurrency .. ':' .. key, heads_of(max_concurrency, key)
  came_at = tonumber(came_at)
  local wait = opens_at(max_concurrency, key) - now
  if wait <= 0 then
    wait = wait_for_older(heads, replica, came_at)
  elseif redis.call('HEXISTS', claims, field) == 1 then
    wait = math.min(wait, glance)
  end
  if wait <= 0 then
    local used, total, resets_in = budget()
    if limit ~= 0 and total >= 0 and used >= total then
      wait = math.min(resets_in, window)
    end
  end
  if wait > 0 then
    redis.call('HSET', heads, replica, string.format('%.0f %.0f', came_at, now + wait))
    expire(heads, 2 * lease)
    return answer(KEY_CLOSED, wait)
  end
  redis.call('HDEL', heads, replica)
  close(field, now + lease)
  redis.call('HSET', claims, field, token)
  expire(claims, lease)
  count_start(token, shard, now)
  return answer(GRANTED, 0)
end

function commands.start_window(max_concurrency, key, shard, token, answered_ago)
  local answered_at = now - answered_ago
  local field, until_when = max_concurrency .. ':' .. key, answered_at + window
  if redis.call('HGET', claims, field) == token then
    redis.call('HDEL', claims, field)
  else
    until_when = math.max(until_when, tonumber(redis.call('HGET', windows, field) or 0))
  end
  close(field, until_when)
  count_start(token, shard, answered_at)
  return answer(GRANTED, 0)
end

function commands.give_back(max_concurrency, key, shard, token)
  local field = max_concurrency .. ':' .. key
  if redis.call('HGET', claims, field) == token then
    redis.call('HDEL', claims, field)
    redis.call('HDEL', windows, field)
  end
  redis.call('ZREM', starts, token)
  redis.call('ZREM', name('shard', shard), token)
  return answer(GRANTED, 0)
end

function commands.withdraw(max_concurrency, key, replica)
  redis.call('HDEL', heads_of(max_concurrency, key), replica)
  return answer(GRANTED, 0)
end

function commands.allow(total, remaining, resets_at, asked_at)
  local known = tonumber(redis.call('HGET', state, 'asked_at') or 0)
  if tonumber(asked_at) >= known then
    redis.call('HSET', state, 'total', total, 'remaining', remaining,
      'resets_at', resets_at, 'asked_at', asked_at)
  end
  return answer(GRANTED, 0)
end

function commands.look()
  return answer(GRANTED, 0)
end

-- Starts that this server may have lost.
function commands.restore()
  for i = 10, #ARGV, 3 do
    count_start(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]))
  end
  return answer(GRANTED, 0)
end

return commands[command](unpack(arguments))
