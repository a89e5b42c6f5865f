-- The decisions that all replicas share: each command is atomic, and uses this server's clock.
--
-- Times are whole microseconds. A TOKEN identifies a claim and the session start that follows from
-- it: REPLICA:NUMBER:SHARD, where SHARD is empty if the client named none. A list is a string of
-- NAME=VALUE entries, separated by spaces. N is a number of rate limit keys, K one of these keys.
--
-- KEYS[1] PREFIX:state   a hash: everything that must not be lost in part
--   since                when this data began
--   last                 when the last command came
--   replid               the replication id of the server that wrote this data
--   retired:REPLICA      when that replica stopped
--   starts_size          the size of PREFIX:starts after the last command
--   shards_size          the size of PREFIX:shards after the last command
--   line_size            the size of PREFIX:line after the last command
--   quick                the last replica that looked over a connection that is quick enough to
--                        release tickets, and when: REPLICA=TIME
--   kept_at              when the expiry of all keys was last put off
--   changed_at           when a command last changed what other replicas have to learn (glance.lua)
--   seen:REPLICA         when the last command of that replica came
--   window:N:K           when the key opens; a claimed key opens when its lease ends
--   claim:N:K            a list: the token of the key's last claim, until it is used or given back,
--                        and the latest time of the answer
--   numbers              a list: by N, until when a key of N is closed, at most
--   releases             a list: by token, until when it counts against releases_per_window; while
--                        it is only claimed, also a question mark and the latest time of the answer
--   identifying          a list: by token, N:K:UNTIL of each confirmed claim that is not used yet;
--                        UNTIL is when its lease ends. Every replica restores them if this data is
--                        lost
--   total, remaining, resets_at, asked_at
--                        the session starts that Discord allows; not set without a bot token
-- KEYS[2] PREFIX:starts  a sorted set: the day's session starts, their tokens by time
-- KEYS[3] PREFIX:shards  a hash: by shard, a list of its starts in the last hour, tokens and times
-- KEYS[4] PREFIX:heads   a hash: by N:K, and by "queue" for all keys, a list of the replicas with a
--                        ticket that has to wait: when the ticket came, and when the replica claims
--                        again
-- KEYS[5] PREFIX:line    a hash: the places in the queue, to show them, and for the next client of
--                        a shard. By shard, a list of its places, REPLICA:NUMBER and
--                        CAME,KEPT_UNTIL,CONFIRM,HELD_UNTIL: the time by which places are sorted,
--                        until when it is kept without a client (0: it has one), 1 for a confirmed
--                        ticket, and until when its shard has to wait because it starts too often.
--                        Places of no shard, and those over MOST_PLACES, have fields of their own:
--                        SHARD/REPLICA:NUMBER

local HOUR = 3600 * 1000000
local DAY = 24 * HOUR
local KEPT = 2 * DAY
local FIRST_DELAY, LONGEST_DELAY = 15 * 1000000, 600 * 1000000

-- If the clock is set back by this at most, time stands still here until the clock has caught up.
local SMALL_STEP = 1 * 1000000
-- A replica that has sent no command for this time is considered dead.
local DEAD_AFTER = 3 * 1000000
-- The most places in the list of one shard: a longer list would take long to read.
local MOST_PLACES = 8
-- About how many fields one list command reads: the other replicas wait meanwhile.
local LISTED_AT_ONCE = 200

local state, starts, shards, heads, line = unpack(KEYS)
local command, replica, seen_since, seen_at = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local window, lease, day, in_flight, grace, glance =
  tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]),
  tonumber(ARGV[10])
local limit, usual_total, free_starts, most_releases, kept_for =
  tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])
local FIRST_ARGUMENT = 16

-- Numbers as large as times lose digits when Lua turns them into strings by itself.
local function word(number)
  return string.format('%.0f', number)
end

local function entries(list)
  return (list or ''):gmatch('(%S+)=(%S+)')
end

-- A list without the entry of this name, and without the entries whose values are not kept.
local function without(list, name, is_kept)
  local kept = {}
  for other, value in entries(list) do
    if other ~= name and (not is_kept or is_kept(value)) then
      kept[#kept + 1] = other .. '=' .. value
    end
  end
  return table.concat(kept, ' ')
end

local function with(list, name, value)
  local others = without(list, name)
  return (others == '' and '' or others .. ' ') .. name .. '=' .. value
end

local function store_list(key, field, list)
  if list == '' then
    redis.call('HDEL', key, field)
  else
    redis.call('HSET', key, field, list)
  end
end

local function expire(key, after)
  redis.call('PEXPIRE', key, math.ceil(after / 1000))
end

-- ---- whether this is still the data that the replicas know ------------------------------------

-- Returns the id of the history of the server's data. It changes with a restart, with a failover,
-- and with a copy of another server's data. It is empty if the server does not let a script ask.
local function current_replid()
  local info = redis.pcall('INFO', 'replication')
  return type(info) == 'string' and info:match('master_replid:(%w+)') or ''
end

local since, last, replid, starts_size, shards_size, line_size, kept_at, seen_here = unpack(
  redis.call('HMGET', state, 'since', 'last', 'replid', 'starts_size', 'shards_size', 'line_size',
    'kept_at', 'seen:' .. replica))
local server = current_replid()

-- Returns the time of this command: later than that of the command before it, unless the clock was
-- set back by more than SMALL_STEP.
local function next_time()
  local clock = redis.call('TIME')
  local shown, after = clock[1] * 1000000 + clock[2], tonumber(last or 0) + 1
  return after - shown <= SMALL_STEP and math.max(shown, after) or shown
end

local now = next_time()

local function is_whole()
  return since and last
    and now > tonumber(last) -- otherwise the clock was set back
    and replid == server
    and tonumber(starts_size) == redis.call('ZCARD', starts)
    and tonumber(shards_size) == redis.call('HLEN', shards)
    and tonumber(line_size) == redis.call('HLEN', line)
    -- An older copy of the data lacks what this replica did last.
    and (seen_since ~= since or tonumber(seen_here or 0) >= seen_at)
end

-- The confirmed claims that are kept when data begins anew, because their leases are long.
local kept_identifying

-- Forgets all windows and claims; the replicas see another `since` and release nothing for a lease.
-- Session starts that are still here stay counted. The replicas restore the others, and the places.
local function begin_anew()
  if last and now > tonumber(last) then
    kept_identifying = redis.call('HGET', state, 'identifying')
  end
  redis.call('DEL', state, heads, line)
  redis.call('ZREMRANGEBYSCORE', starts, '(' .. word(now), '+inf')
  since, kept_at = word(now), false
end

if not is_whole() then
  begin_anew()
end
-- A server that is out of memory refuses this command, before anything is changed.
redis.call('HSET', state, 'since', since, 'last', word(now), 'replid', server)

-- No key may expire before the others: that would look like lost data. So their expiry is put off
-- together, once an hour and as soon as there is a new key.
local function put_off_expiry(starts_now, shards_now, line_now)
  local is_new = (starts_now > 0 and starts_size == '0') or (shards_now > 0 and shards_size == '0')
    or (line_now > 0 and line_size == '0')
  if is_new or now - tonumber(kept_at or 0) > HOUR then
    redis.call('HSET', state, 'kept_at', word(now))
    expire(state, KEPT)
    expire(starts, KEPT)
    expire(shards, KEPT)
    expire(line, KEPT)
  end
end

-- ---- the day's session starts -----------------------------------------------------------------

-- Returns how many starts are used, the total (-1: no limit is known), when some are free again,
-- when the next one can be claimed if none is left, how many are in PREFIX:starts, and 1 if the
-- limit is Discord's, otherwise 0.
local function budget()
  local total, remaining, resets_at, asked_at = unpack(
    redis.call('HMGET', state, 'total', 'remaining', 'resets_at', 'asked_at'))
  if total then
    total, remaining, resets_at, asked_at =
      tonumber(total), tonumber(remaining), tonumber(resets_at), tonumber(asked_at)
    -- One window later than Discord: a start at the moment of the reset may count for the day
    -- before.
    while now >= resets_at + window do
      remaining, asked_at, resets_at = total, resets_at, resets_at + DAY
      redis.call('HSET', state, 'remaining', word(remaining), 'asked_at', word(asked_at),
        'resets_at', word(resets_at))
    end
    redis.call('ZREMRANGEBYSCORE', starts, '-inf', word(asked_at - in_flight))
    local size = redis.call('ZCARD', starts)
    return total - remaining + size, total, resets_at, resets_at + window, size, 1
  end
  redis.call('ZREMRANGEBYSCORE', starts, '-inf', word(now - day))
  if limit <= 0 then
    redis.call('ZREMRANGEBYRANK', starts, 0, -usual_total - 1)
  end
  local first = redis.call('ZRANGE', starts, 0, 0, 'WITHSCORES')[2]
  local resets_at, size = (first or now) + day, redis.call('ZCARD', starts)
  return size, limit > 0 and limit or -1, resets_at, resets_at, size, 0
end

local function shard_of(token)
  return token:match('^[^:]*:[^:]*:(%d+)$') or ''
end

local function is_recent(at)
  at = tonumber(at)
  return at > now - HOUR and at <= now -- it is later than now if the clock was set back
end

-- Checks two random shards, so that shards that start no more are forgotten in the course of time.
local function forget_some_shards()
  local some = redis.call('HRANDFIELD', shards, 2, 'WITHVALUES')
  for i = 1, #some, 2 do
    if without(some[i + 1], nil, is_recent) == '' then
      redis.call('HDEL', shards, some[i])
    end
  end
end

-- Counts a start. If it is counted already, the later time holds, because a replica may restore a
-- start without knowing when the shard identified.
local function count_start(token, at)
  at = math.min(math.max(at, tonumber(redis.call('ZSCORE', starts, token) or 0)), now)
  redis.call('ZADD', starts, word(at), token)
  local shard = shard_of(token)
  if free_starts > 0 and shard ~= '' and is_recent(at) then
    local recent = without(redis.call('HGET', shards, shard), token, is_recent)
    redis.call('HSET', shards, shard, with(recent, token, word(at)))
    forget_some_shards()
  end
end

local function uncount_start(token)
  redis.call('ZREM', starts, token)
  local shard = shard_of(token)
  local listed = shard ~= '' and redis.call('HGET', shards, shard)
  if listed then
    store_list(shards, shard, without(listed, token))
  end
end

-- Returns how long a shard that starts too often has to wait. A claim does not count while its
-- client may still be answered: it may be given back, and it keeps the key closed.
local function shard_wait(shard, number, key)
  if free_starts == 0 or shard == '' then
    return 0
  end
  local open_token, answer_by = entries(redis.call('HGET', state, 'claim:' .. number .. ':' .. key))()
  local used, earliest, latest = 0, now, 0
  for token, at in entries(redis.call('HGET', shards, shard)) do
    local may_be_given_back = token == open_token and now <= tonumber(answer_by)
    if is_recent(at) and not may_be_given_back then
      at, used = tonumber(at), used + 1
      earliest, latest = math.min(earliest, at), math.max(latest, at)
    end
  end
  local excess = used - free_starts
  if excess < 0 then
    return 0
  end
  local delay = math.min(FIRST_DELAY * 2 ^ excess, LONGEST_DELAY)
  return math.max(0, math.min(latest + delay, earliest + HOUR) - now)
end

-- ---- windows ----------------------------------------------------------------------------------

local function greatest_common_divisor(a, b)
  while b > 0 do
    a, b = b, a % b
  end
  return a
end

local function is_closed(until_when)
  return tonumber(until_when) > now
end

-- Returns whether a window is over for all replicas, including those that wait longer: by their
-- caution, which is at most a lease.
local function is_past(until_when)
  return tonumber(until_when) + lease <= now
end

local function close(number, key, until_when)
  local numbers = redis.call('HGET', state, 'numbers')
  local latest = until_when
  for other, its_latest in entries(numbers) do
    if other == number then
      latest = math.max(latest, tonumber(its_latest))
    end
  end
  redis.call('HSET', state, 'window:' .. number .. ':' .. key, word(until_when),
    'numbers', with(numbers, number, word(latest)))
end

local function is_claimed_with(number, key, token)
  return entries(redis.call('HGET', state, 'claim:' .. number .. ':' .. key))() == token
end

-- Calls a function with each window of other numbers of keys.
local function for_windows_of_others(number, visit)
  local fields = redis.call('HGETALL', state)
  for i = 1, #fields, 2 do
    local its_number, key = fields[i]:match('^window:(%d+):(%d+)$')
    if its_number and its_number ~= number then
      visit(its_number, key, tonumber(fields[i + 1]))
    end
  end
end

-- Forgets the windows and claims of another number of keys.
local function forget_number(number, former)
  for_windows_of_others(number, function(other, key)
    if other == former then
      redis.call('HDEL', state, 'window:' .. other .. ':' .. key, 'claim:' .. other .. ':' .. key)
    end
  end)
  store_list(state, 'numbers', without(redis.call('HGET', state, 'numbers'), former))
end

-- Returns after what time, at most, to ask again for a claimed key. Until answer_by, the claim may
-- be given back at any time. After that, its shard is identifying, and a window follows.
local function shortest_wait(answer_by)
  return now <= tonumber(answer_by) and glance or window
end

-- Returns when a key opens, and after what time, at most, to ask again if it is claimed. A closed
-- key of another number of keys also closes each key that shares a shard with it.
local function opens_at(number, key)
  local latest = tonumber(redis.call('HGET', state, 'window:' .. number .. ':' .. key) or 0)
  local closing, is_mixed = number .. ':' .. key, false
  for other, until_when in entries(redis.call('HGET', state, 'numbers')) do
    if other ~= number and is_past(until_when) then
      forget_number(number, other)
    end
    is_mixed = is_mixed or (other ~= number and not is_past(until_when))
  end
  if is_mixed then
    for_windows_of_others(number, function(other, its_key, until_when)
      local shared = greatest_common_divisor(tonumber(other), tonumber(number))
      if (its_key - key) % shared == 0 and until_when > latest then
        latest, closing = until_when, other .. ':' .. its_key
      end
    end)
  end
  local claim = is_closed(latest) and redis.call('HGET', state, 'claim:' .. closing) or ''
  local _, answer_by = entries(claim)()
  return latest, answer_by and shortest_wait(answer_by) or math.huge
end

-- ---- confirmed claims --------------------------------------------------------------------------

local function set_identifying(token, number, key, until_when)
  local others = without(redis.call('HGET', state, 'identifying'), token, function(value)
    return is_closed(value:match('%d+$'))
  end)
  store_list(state, 'identifying', until_when
    and with(others, token, number .. ':' .. key .. ':' .. word(until_when)) or others)
end

-- ---- releases of all keys in one window -------------------------------------------------------

local function set_release(token, until_when, mark)
  if most_releases > 0 then
    local live = without(redis.call('HGET', state, 'releases'), token, function(value)
      return not is_past(value:match('%d+'))
    end)
    store_list(state, 'releases', until_when and with(live, token, word(until_when) .. mark) or live)
  end
end

-- Returns when one more release is allowed over all keys, and after what time, at most, to ask
-- again if some of the releases are only claimed.
local function queue_opens_at()
  local ends, may_end_in = {}, math.huge
  if most_releases > 0 then
    for _, value in entries(redis.call('HGET', state, 'releases')) do
      local until_when, answer_by = value:match('(%d+)%??(%d*)')
      ends[#ends + 1] = tonumber(until_when)
      if answer_by ~= '' and is_closed(until_when) then
        may_end_in = math.min(may_end_in, shortest_wait(answer_by))
      end
    end
    table.sort(ends)
  end
  local place = #ends - most_releases + 1
  return most_releases > 0 and ends[place] or 0, may_end_in
end

local function restore_identifying(number, key, token, until_when)
  local field = number .. ':' .. key
  if until_when > tonumber(redis.call('HGET', state, 'window:' .. field) or 0) then
    close(number, key, until_when)
    redis.call('HSET', state, 'claim:' .. field, with('', token, word(now)))
  end
  set_release(token, until_when, '?' .. word(now))
  set_identifying(token, number, key, until_when)
  if not redis.call('ZSCORE', starts, token) then
    count_start(token, now)
  end
end

for token, value in entries(kept_identifying) do
  local number, key, until_when = value:match('(%d+):(%d+):(%d+)')
  if is_closed(until_when) then
    restore_identifying(number, key, token, tonumber(until_when))
  end
end

-- ---- oldest first over all replicas -----------------------------------------------------------

local function set_head(field, came_at, asks_at)
  local others = without(redis.call('HGET', heads, field), replica, function(value)
    return now <= tonumber(value:match(',(%d+)')) + grace
  end)
  redis.call('HSET', heads, field, with(others, replica, word(came_at) .. ',' .. word(asks_at)))
  expire(heads, 2 * lease)
end

-- Keeps the ticket of this replica, if there is one, ahead of others until it has asked again.
local function keep_head(field, asks_at)
  for other, value in entries(redis.call('HGET', heads, field)) do
    if other == replica then
      set_head(field, value:match('%d+'), asks_at)
    end
  end
end

local function drop_head(field)
  local listed = redis.call('HGET', heads, field)
  if listed then
    store_list(heads, field, without(listed, replica))
  end
end

-- Returns the latest time at which a claim arrives that a replica sends at some time. The caution
-- of the replica is about as long as its round trip.
local function asks_again_at(at, caution)
  return math.max(at, now) + math.min(2 * caution, window / 2)
end

-- Returns how long to wait for an older ticket of another replica. A replica that does not ask when
-- it should is ignored soon after.
local function wait_for_older(field, came_at)
  local wait = 0
  for other, value in entries(redis.call('HGET', heads, field)) do
    local its_came_at, asks_at = value:match('(%d+),(%d+)')
    if other ~= replica and tonumber(its_came_at) < came_at
      and not redis.call('HGET', state, 'retired:' .. other) then
      wait = math.max(wait, asks_at + grace - now)
    end
  end
  return math.min(wait, glance)
end

-- ---- places ------------------------------------------------------------------------------------

-- Returns when a dead or retired replica was last seen; nil for any other replica.
local function last_seen(owner)
  local seen, retired = unpack(redis.call('HMGET', state, 'seen:' .. owner, 'retired:' .. owner))
  local at = tonumber(retired or seen or 0)
  return owner ~= replica and (retired or at + DEAD_AFTER < now) and at or nil
end

local function read_place(name, value)
  local came, kept_until, confirm, held_until = value:match('(%d+),(%d+),(%d),(%d+)')
  local place = {name = name, came = tonumber(came), confirm = confirm, held_until = held_until}
  place.owner = name:match('^[^:]*')
  place.kept_until = kept_until ~= '0' and tonumber(kept_until) or nil
  local seen = not place.kept_until and last_seen(place.owner)
  -- Until when the next client of the shard can take the place; nil while it has a client.
  place.free_until = seen and seen + kept_for or place.kept_until
  return place
end

-- Returns whether this command can forget a place. A place that is over stays for a lease, and its
-- own replica does not forget it here: a client may have come back to it in time, and the command
-- that tells this may still be on the way.
local function is_past_place(place)
  return place.free_until and place.free_until + lease <= now and place.owner ~= replica
end

local function read_places(list)
  local places = {}
  for name, value in entries(list) do
    local place = read_place(name, value)
    if not is_past_place(place) then
      places[#places + 1] = place
    end
  end
  return places
end

local function place_value(place)
  return word(place.came) .. ',' .. word(place.kept_until or 0) .. ',' .. place.confirm .. ','
    .. place.held_until
end

local function write_places(field, places)
  local list = {}
  for i = 1, #places do
    list[i] = places[i].name .. '=' .. place_value(places[i])
  end
  store_list(line, field, table.concat(list, ' '))
end

local function index_of(places, name)
  for i = 1, #places do
    if places[i].name == name then
      return i
    end
  end
end

-- Gives a client the oldest free place of its shard at another replica, if that is older than its
-- own. The place must not have been over when the client connected: that the other replica is dead
-- may be known only later. If the client had a place before, that place is free instead.
local function take_oldest(places, mine, connected, is_new)
  local oldest
  for i = 1, #places do
    local other = places[i]
    if other.free_until and other.free_until > connected and other.owner ~= replica
      and other.came < mine.came and (not oldest or other.came < places[oldest].came) then
      oldest = i
    end
  end
  if oldest then
    local other = places[oldest]
    mine.came, other.came = other.came, mine.came
    if is_new then
      table.remove(places, oldest)
    end
  end
end

-- Returns 1 if an older place of the shard may be free soon: its client may have left. Otherwise 0.
local function expects_older(places, mine)
  for i = 1, #places do
    local other = places[i]
    if not other.free_until and other.owner ~= replica and other.came < mine.came then
      return 1
    end
  end
  return 0
end

-- Checks two random fields, so that places of dead replicas are forgotten in the course of time.
local function forget_some_places()
  local some = redis.call('HRANDFIELD', line, 2, 'WITHVALUES')
  for i = 1, #some, 2 do
    local name = some[i]:match('/(.*)')
    if not name then
      write_places(some[i], read_places(some[i + 1]))
    elseif is_past_place(read_place(name, some[i + 1])) then
      redis.call('HDEL', line, some[i])
    end
  end
end

local function end_place(name, shard)
  local places = read_places(shard ~= '' and redis.call('HGET', line, shard) or '')
  local index = index_of(places, name)
  if index then
    table.remove(places, index)
    write_places(shard, places)
  else
    redis.call('HDEL', line, shard .. '/' .. name)
  end
end

-- Notes a place of this replica. KIND is n if this data does not have the place yet, or has lost
-- it, otherwise k. If a place of KIND k is not here any more, another replica may have taken it
-- over; then its time is when its client connected. Returns the time of the place, and 1 if an
-- older place of its shard may be free soon.
local function set_place(name, shard, kind, came, connected, kept_until, confirm, held_until)
  local places = read_places(shard ~= '' and redis.call('HGET', line, shard) or '')
  local alone, index = shard .. '/' .. name, index_of(places, name)
  local mine = places[index] or {name = name, owner = replica, came = came}
  mine.confirm, mine.held_until = confirm, held_until
  mine.kept_until = kept_until > 0 and kept_until or nil
  mine.free_until = mine.kept_until
  if not index and (shard == '' or #places >= MOST_PLACES or redis.call('HGET', line, alone)) then
    redis.call('HSET', line, alone, place_value(mine))
    return came, 0
  end
  if not index then
    if kind == 'k' and mine.kept_until then
      return came, 0
    end
    mine.came = kind == 'k' and connected or came
    places[#places + 1] = mine
  end
  local has_client, is_new = not mine.kept_until, not index and kind == 'n'
  if kept_for > 0 and (has_client or is_new) then
    take_oldest(places, mine, has_client and connected or came, is_new)
  end
  write_places(shard, places)
  return mine.came, has_client and kept_for > 0 and expects_older(places, mine) or 0
end

-- ---- commands ---------------------------------------------------------------------------------

-- Whether the replica knows this data. If not, its times may be those of another clock. The replica
-- learns this from the answer, and tells everything again.
local is_known = seen_since == since

local GRANTED, KEY_CLOSED, SHARD_HELD, QUEUE_CLOSED = 0, 1, 2, 3

-- The commands that do not make other replicas look. The look of a replica with a slow connection
-- is not among them: others then look too, and it learns of a quicker one.
local IS_OWN_AFFAIR = {
  look = ARGV[FIRST_ARGUMENT + 1] == '1', announce = true, withdraw = true, list = true,
}

local function answer(verdict, wait)
  local used, total, resets_at, _, starts_now, is_discords = budget()
  local shards_now, line_now = redis.call('HLEN', shards), redis.call('HLEN', line)
  redis.call('HSET', state, 'seen:' .. replica, word(now), 'starts_size', word(starts_now),
    'shards_size', word(shards_now), 'line_size', word(line_now))
  if verdict == GRANTED and not IS_OWN_AFFAIR[command] then
    redis.call('HSET', state, 'changed_at', word(now))
  end
  put_off_expiry(starts_now, shards_now, line_now)
  return {verdict, wait, now, tonumber(since), used, total, math.max(0, resets_at - now),
    is_discords}
end

-- Returns how long a claim has to wait for something that opens. After a grant, a replica waits for
-- the last part of its caution by itself, so that it does not have to ask twice.
local function wait_for(opens, caution)
  return opens + math.max(0, caution - glance) - now
end

-- Returns the verdict on a claim, and how long to wait; for a grant, how long key and queue were
-- open.
local function decide(number, key, shard, came_at, caution)
  local held = shard_wait(shard, number, key)
  if held > 0 then
    return SHARD_HELD, held
  end

  -- The key is checked first, so that QUEUE_CLOSED goes to the oldest ticket of a replica whose key
  -- is open.
  local key_opens, may_end_in = opens_at(number, key)
  local wait = wait_for(key_opens, caution)
  if wait > 0 then
    return KEY_CLOSED, math.min(wait, may_end_in)
  end

  local queue_opens
  queue_opens, may_end_in = queue_opens_at()
  wait = wait_for(queue_opens, caution)
  if wait > 0 then
    return QUEUE_CLOSED, math.min(wait, may_end_in)
  end

  local used, total, _, resumes_at = budget()
  if limit ~= 0 and total >= 0 and used >= total then
    return KEY_CLOSED, math.min(resumes_at - now, window)
  end

  wait = wait_for_older(number .. ':' .. key, came_at)
  if wait > 0 then
    return KEY_CLOSED, wait
  end
  -- If all keys can release in each window, the tickets of one key need not wait for another key.
  wait = most_releases > 0 and most_releases < tonumber(number) and wait_for_older('queue', came_at) or 0
  if wait > 0 then
    return QUEUE_CLOSED, wait
  end

  return GRANTED, now - math.max(queue_opens, key_opens)
end

local commands = {}

-- its_lease: how long the key is closed if no other command about the claim comes.
-- caution: by how much this clock may have been set forward during a window.
-- set_back_by: by how much it was set back, which other replicas may not have noticed.
function commands.claim(number, key, token, its_lease, came_at, useless_at, caution, set_back_by)
  came_at, caution = tonumber(came_at), tonumber(caution)
  -- A late grant could not be used.
  if not is_known or now > tonumber(useless_at) or caution > lease then
    return answer(KEY_CLOSED, glance)
  end
  local verdict, wait = decide(number, key, shard_of(token), came_at, caution)
  local field = number .. ':' .. key
  local asks_at = asks_again_at(now + wait, caution)
  if verdict == KEY_CLOSED or verdict == QUEUE_CLOSED then
    set_head(field, came_at, asks_at)
  elseif verdict == GRANTED then
    set_head(field, came_at, useless_at) -- until then this claim may be given back, see keep_head()
  end
  if most_releases > 0 then
    if verdict == QUEUE_CLOSED then
      set_head('queue', came_at, asks_at)
    else
      drop_head('queue')
    end
  end
  if verdict == GRANTED then
    local until_when = now + its_lease + set_back_by
    close(number, key, until_when)
    redis.call('HSET', state, 'claim:' .. field, with('', token, useless_at))
    set_release(token, until_when, '?' .. useless_at)
    if tonumber(its_lease) > lease then
      set_identifying(token, number, key, until_when)
    end
    count_start(token, now)
  end
  return answer(verdict, wait)
end

function commands.start_window(number, key, token, started_ago, its_window)
  local started_at = now - started_ago
  local until_when = started_at + its_window
  set_release(token, until_when, '')
  set_identifying(token, nil)
  drop_head(number .. ':' .. key)
  if is_claimed_with(number, key, token) then
    redis.call('HDEL', state, 'claim:' .. number .. ':' .. key)
  else
    local closed_until = redis.call('HGET', state, 'window:' .. number .. ':' .. key)
    until_when = math.max(until_when, tonumber(closed_until or 0))
  end
  close(number, key, until_when)
  count_start(token, started_at)
  return answer(GRANTED, 0)
end

-- Restores a claim whose shard is identifying: this server may have lost it.
function commands.restore_claim(number, key, token, lease_left)
  restore_identifying(number, key, token, now + lease_left)
  return answer(GRANTED, 0)
end

function commands.give_back(number, key, token, caution)
  local field = number .. ':' .. key
  if is_claimed_with(number, key, token) then
    redis.call('HDEL', state, 'claim:' .. field, 'window:' .. field)
    keep_head(field, asks_again_at(now, tonumber(caution)))
  end
  set_release(token, nil)
  set_identifying(token, nil)
  uncount_start(token)
  return answer(GRANTED, 0)
end

-- Announces a ticket of a replica that cannot claim yet, but will claim the key at asks_at. If its
-- shard starts too often and has to wait for longer, the ticket does not go first.
function commands.announce(number, key, shard, came_at, asks_at, caution)
  if not is_known then
    return answer(KEY_CLOSED, 0)
  end
  asks_at = asks_again_at(tonumber(asks_at), tonumber(caution))
  local held = shard_wait(shard, number, key)
  if now + held > asks_at then
    return answer(SHARD_HELD, held)
  end
  set_head(number .. ':' .. key, tonumber(came_at), asks_at)
  if most_releases > 0 then
    set_head('queue', tonumber(came_at), asks_at)
  end
  return answer(GRANTED, 0)
end

function commands.withdraw(number, key)
  drop_head(number .. ':' .. key)
  drop_head('queue')
  return answer(GRANTED, 0)
end

-- Changed places of this replica: NUMBER SHARD KIND CAME CONNECTED KEPT_UNTIL CONFIRM HELD_UNTIL,
-- where KIND is e for a place that has ended. Returns two numbers for each, see set_place().
function commands.share()
  if not is_known then
    return answer(GRANTED, 0)
  end
  local told = {}
  for i = FIRST_ARGUMENT, #ARGV do
    local number, shard, kind, came, connected, kept_until, confirm, held_until =
      ARGV[i]:match('^(%d+) (%d*) (%a) (%d+) (%d+) (%d+) (%d) (%d+)$')
    local name, time, expects = replica .. ':' .. number, 0, 0
    if kind == 'e' then
      end_place(name, shard)
    else
      time, expects = set_place(name, shard, kind, tonumber(came), tonumber(connected),
        tonumber(kept_until), confirm, held_until)
    end
    told[#told + 1] = time
    told[#told + 1] = expects
  end
  forget_some_places()
  expire(line, KEPT) -- this key is new if its last place had ended before the next one came
  local reply = answer(GRANTED, 0)
  for i = 1, #told do
    reply[#reply + 1] = told[i]
  end
  return reply
end

-- Lists some places. Returns in addition the cursor of the next call (0: this was the last one); at
-- the first call, when each key opens, and the confirmed claims that are not used yet; and the
-- places that are away or whose clients wait at other replicas:
-- REPLICA:NUMBER SHARD CAME FREE_UNTIL CONFIRM HELD_UNTIL.
function commands.list(cursor, number)
  local reply = answer(GRANTED, 0)
  local scanned = redis.call('HSCAN', line, cursor, 'COUNT', LISTED_AT_ONCE)
  local opens = {}
  for key = 0, cursor == '0' and number - 1 or -1 do
    opens[#opens + 1] = redis.call('HGET', state, 'window:' .. number .. ':' .. key) or '0'
  end
  reply[#reply + 1] = scanned[1]
  reply[#reply + 1] = table.concat(opens, ' ')
  reply[#reply + 1] = cursor == '0' and redis.call('HGET', state, 'identifying') or ''
  local function list(shard, name, value)
    local place = read_place(name, value)
    local is_over = place.free_until and place.free_until <= now
    if not is_over and (place.free_until or place.owner ~= replica) then
      reply[#reply + 1] = table.concat({name, shard, word(place.came), word(place.free_until or 0),
        place.confirm, place.held_until}, ' ')
    end
  end
  for i = 1, #scanned[2], 2 do
    local shard, name = scanned[2][i]:match('^(%d*)/(.*)')
    if name then
      list(shard, name, scanned[2][i + 1])
    else
      for its_name, value in entries(scanned[2][i + 1]) do
        list(scanned[2][i], its_name, value)
      end
    end
  end
  return reply
end

-- Notes that this replica stops: its places are free now, and no replica waits for its tickets.
function commands.retire()
  redis.call('HSET', state, 'retired:' .. replica, word(now))
  return answer(GRANTED, 0)
end

function commands.update_budget(total, remaining, resets_at, asked_at)
  local known = tonumber(redis.call('HGET', state, 'asked_at') or 0)
  if is_known and tonumber(asked_at) >= known then
    redis.call('HSET', state, 'total', total, 'remaining', remaining,
      'resets_at', resets_at, 'asked_at', asked_at)
  end
  return answer(GRANTED, 0)
end

-- is_quick: 1 if this replica's connection is quick enough to release tickets, otherwise 0.
-- Returns in addition the server's replication id, how long ago another quick replica looked, the
-- confirmed claims that are not used yet, and the starts since `from`: their tokens and times.
function commands.look(from, is_quick)
  local quick, quick_at = entries(redis.call('HGET', state, 'quick'))()
  if is_quick == '1' then
    redis.call('HSET', state, 'quick', replica .. '=' .. word(now))
  end
  local some = redis.call('HRANDFIELD', state, 2, 'WITHVALUES')
  for i = 1, #some, 2 do
    if (some[i]:find('^seen:') or some[i]:find('^retired:')) and tonumber(some[i + 1]) < now - DAY then
      redis.call('HDEL', state, some[i])
    end
  end
  local reply = answer(GRANTED, 0)
  reply[#reply + 1] = server
  reply[#reply + 1] = now - (quick ~= replica and tonumber(quick_at) or 0)
  reply[#reply + 1] = redis.call('HGET', state, 'identifying') or ''
  local recent = redis.call('ZRANGEBYSCORE', starts, from, '+inf', 'WITHSCORES')
  for i = 1, #recent do
    reply[#reply + 1] = recent[i]
  end
  return reply
end

-- Counts starts that this server may have lost: their tokens and times.
function commands.restore()
  for i = FIRST_ARGUMENT, is_known and #ARGV or 0, 2 do
    count_start(ARGV[i], tonumber(ARGV[i + 1]))
  end
  return answer(GRANTED, 0)
end

-- Uncounts starts that were restored, though their claims were given back.
function commands.uncount()
  for i = FIRST_ARGUMENT, #ARGV do
    uncount_start(ARGV[i])
  end
  return answer(GRANTED, 0)
end

return commands[command](unpack(ARGV, FIRST_ARGUMENT, math.min(#ARGV, FIRST_ARGUMENT + 7)))
