"use strict";

const SILENT_MS = 5000; // events come every second: after this time the connection is lost
const RETRY_MS = 2000;
const TICK_MS = 100;
const SEARCH_MS = 5000;
const TITLE = document.title;
const NAME = `gateway-queue ${location.pathname}${location.search}`;
const STILL = matchMedia("(prefers-reduced-motion: reduce)");

let skew = 0; // what to add to this machine's clock to get the server's, in ms

/** Write a duration, as the server does. */
function duration(seconds, decimals = 0) {
  if (seconds < 60) {
    return `${(Math.floor(seconds * 10 ** decimals) / 10 ** decimals).toFixed(decimals)} s`;
  }
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) {
    return `${minutes}:${String(Math.floor(seconds) % 60).padStart(2, "0")} min`;
  }
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function now() {
  return (Date.now() + skew) / 1000;
}

/** Update the durations since and until a moment. */
function tick(root) {
  for (const each of root.querySelectorAll("[data-until]")) {
    write(each, duration(Math.max(0, each.dataset.until - now()), 1));
  }
  for (const each of root.querySelectorAll("[data-since]")) {
    write(each, duration(Math.max(0, now() - each.dataset.since)));
  }
}

/** Write times of day in the reader's time zone, and commands with the address of this page. */
function localise(root) {
  for (const each of root.querySelectorAll("[data-ask]")) {
    write(each, `curl "${new URL(".", location)}${each.dataset.ask}"`);
  }
  const clock = { hour: "2-digit", minute: "2-digit", second: "2-digit" };
  const today = new Intl.DateTimeFormat([], clock);
  const otherDay = new Intl.DateTimeFormat([], { weekday: "short", ...clock });
  const date = new Date(now() * 1000).toDateString();
  for (const each of root.querySelectorAll("time")) {
    const at = new Date(each.dateTime);
    write(each, (at.toDateString() === date ? today : otherDay).format(at));
  }
}

/** Move the timelines by the time since the snapshot was taken. */
function drift() {
  const live = document.getElementById("live");
  const passed = now() - live.dataset.now;
  for (const each of live.querySelectorAll("[data-drift]")) {
    each.setAttribute("transform", `translate(${-passed.toFixed(2)} 0)`);
  }
}

/**
 * Change a tree into another, node by node, so that focus, selection and opened details stay.
 * Elements that come and go have ids, so that none is confused with another; their order never
 * changes.
 */
function change(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const each of [...old.children]) {
    if (each.id && !fresh.querySelector(`#${each.id}`)) each.remove();
  }
  old.normalize(); // joins the texts around a removed element, as in the other tree
  let next = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    if (next && next.nodeName === wanted.nodeName && (next.id ?? "") === (wanted.id ?? "")) {
      change(next, wanted);
      next = next.nextSibling;
    } else {
      old.insertBefore(wanted, next);
    }
  }
  while (next) {
    const superfluous = next;
    next = next.nextSibling;
    superfluous.remove();
  }
}

function show(html) {
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  const live = document.getElementById("live");
  const wanted = fresh.content.firstElementChild;
  if (wanted.dataset.build !== live.dataset.build) {
    location.reload(); // the server now has another version of this page
    return;
  }
  skew = wanted.dataset.now * 1000 - Date.now();
  localise(fresh.content);
  tick(fresh.content);
  live.toggleAttribute("data-trouble", wanted.hasAttribute("data-trouble"));
  change(live, wanted);
  drift();
}

/** Show the state in the title and in the icon, also for a tab in the background. */
function showTrouble() {
  const { waiting, trouble } = document.getElementById("live").dataset;
  const bad = lost || trouble !== undefined;
  document.title = (bad ? "⚠ " : "") + (waiting === "0" ? "" : `(${waiting}) `) + TITLE;
  const icon = document.getElementById("icon");
  const href = bad ? icon.dataset.trouble : goodIcon;
  if (icon.getAttribute("href") !== href) icon.setAttribute("href", href);
}

function say(text) {
  const connection = document.getElementById("connection");
  connection.hidden = false;
  connection.classList.toggle("bad", lost);
  write(connection, text);
}

/** Show whether events come; without them, the page is dimmed and its clock stops. */
function showConnection() {
  if (document.hidden) return; // events come only while the page is visible
  if (performance.now() - Math.max(heardAt, visibleAt) > SILENT_MS) lost = true;
  document.body.classList.toggle("lost", lost);
  if (lost) {
    say(`Connection lost, last update ${duration((performance.now() - heardAt) / 1000)} ago`);
  } else if (hasHeard) {
    say("Live");
  }
  showTrouble();
}

/** Handle an event that this tab or another tab has received. */
function handle(message) {
  lost = message.html === undefined;
  if (!lost) {
    hasHeard = true;
    heardAt = performance.now();
    if (!document.hidden) show(message.html);
  }
  showConnection();
}

/** Listen to events until aborted, and open a new stream when the last one has ended. */
function listen(signal) {
  return new Promise((resolve) => {
    let events, toldAt;
    const tell = (message) => {
      handle(message);
      channel.postMessage(message);
    };
    const open = () => {
      events = new EventSource(`events${location.search}`);
      toldAt = performance.now();
      events.onmessage = ({ data }) => {
        toldAt = performance.now();
        tell({ html: data });
      };
      events.onerror = () => tell({});
    };
    const watch = setInterval(() => {
      const silent = performance.now() - toldAt > SILENT_MS;
      if (silent) tell({});
      // A browser tries again by itself, except after an answer that is not a stream of events.
      if (silent || events.readyState === EventSource.CLOSED) {
        events.close();
        open();
      }
    }, RETRY_MS);
    signal.addEventListener("abort", () => {
      clearInterval(watch);
      events.close();
      resolve();
    });
    open();
  });
}

/** Get events while this tab is visible: one tab listens, and tells the others. */
function follow() {
  visible.abort();
  if (document.hidden) return;
  visible = new AbortController();
  visibleAt = performance.now();
  const { signal } = visible;
  if (!navigator.locks) {
    listen(signal); // browsers have locks only for pages over TLS or of the same machine
    return;
  }
  navigator.locks.request(NAME, { signal }, () => listen(signal)).catch(() => {});
}

/** Write where a shard is. */
function whereabouts({ shard, lanes, max_concurrency: keys }) {
  const parts = [];
  for (const { tickets, waiting, identifying } of lanes) {
    if (identifying?.shard === shard.shard) {
      parts.push(`is identifying for ${duration(identifying.for)}`);
    }
    for (const { state, position, waited, eta } of tickets) {
      const turn = eta === null ? "its turn is not known" : `its turn comes in ${duration(eta)}`;
      const held = state === "held" ? ", held because it starts too often" : "";
      const place = `waits at place ${position} (${waiting} waiting)${held}`;
      parts.push(
        state === "away"
          ? `is away: its client left, place ${position} is kept`
          : `${place}; waited ${duration(waited)}, ${turn}`,
      );
    }
  }
  if (!parts.length) parts.push("is not in the queue");
  const last = shard.last_release;
  parts.push(
    last
      ? `last released ${duration(last.ago)} ago`
      : "no recent release by this server",
    `${shard.starts} session start${shard.starts === 1 ? "" : "s"} in 24 h`,
  );
  const key = keys > 1 ? ` (key ${shard.rate_limit_key})` : "";
  return `Shard ${shard.shard}${key} ${parts.join("; ")}.`;
}

/** Find the shard that is asked for. */
async function find() {
  const found = document.getElementById("found");
  const wanted = document.querySelector("#search input").value.trim();
  found.hidden = wanted === "";
  if (found.hidden || document.hidden || lost) return;
  try {
    const query = new URLSearchParams(location.search);
    query.set("shard", wanted);
    const response = await fetch(`status?${query}`);
    const answer = await response.json();
    write(found, response.ok ? whereabouts(answer) : answer.detail);
  } catch {
    write(found, "The server does not answer.");
  }
}

let heardAt = performance.now();
let visibleAt = heardAt;
let hasHeard = false;
let lost = false;
let visible = new AbortController();
const goodIcon = document.getElementById("icon").getAttribute("href");
const channel = new BroadcastChannel(NAME);
channel.onmessage = ({ data }) => handle(data);

const start = document.getElementById("live");
skew = start.dataset.now * 1000 - Date.now();
localise(document);
setInterval(() => {
  if (document.hidden || lost) return;
  tick(document);
  if (!STILL.matches) drift();
}, TICK_MS);
setInterval(showConnection, 1000);

const search = document.getElementById("search");
search.hidden = false;
search.addEventListener("submit", (event) => {
  event.preventDefault();
  find();
});
search.addEventListener("input", find);
setInterval(find, SEARCH_MS);

document.addEventListener("visibilitychange", follow);
showTrouble();
follow();
