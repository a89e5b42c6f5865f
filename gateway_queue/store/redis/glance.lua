-- Tells a replica for which of its idle bots the data has changed or was lost. It writes nothing,
-- because each write would make the other replicas look, too.
--
-- KEYS and ARGV have three words for each bot: PREFIX:state, PREFIX:starts and PREFIX:shards, see
-- decisions.lua, and REPLICA, `since` and the time of the replica's last command, as it knows them.
-- Returns the time, and for each bot: 0 nothing new, 1 changed, 2 lost.

local UNCHANGED, CHANGED, LOST = 0, 1, 2

-- As in decisions.lua.
local SMALL_STEP = 1 * 1000000

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local info = redis.pcall('INFO', 'replication')
local server = type(info) == 'string' and info:match('master_replid:(%w+)') or ''

local function verdict(state, starts, shards, replica, known_since, seen_at)
  local since, last, replid, starts_size, shards_size, changed_at, seen_here = unpack(
    redis.call('HMGET', state, 'since', 'last', 'replid', 'starts_size', 'shards_size',
      'changed_at', 'seen:' .. replica))
  local is_same = since == known_since
    and tonumber(last) - now < SMALL_STEP
    and replid == server
    and tonumber(starts_size) == redis.call('ZCARD', starts)
    and tonumber(shards_size) == redis.call('HLEN', shards)
    and tonumber(seen_here or 0) >= tonumber(seen_at)
  if not is_same then
    return LOST
  end
  return tonumber(changed_at or 0) > tonumber(seen_at) and CHANGED or UNCHANGED
end

local reply = {now}
for i = 1, #KEYS, 3 do
  reply[#reply + 1] = verdict(KEYS[i], KEYS[i + 1], KEYS[i + 2], ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
return reply
