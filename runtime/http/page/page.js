// Asks /stats once a second and shows the answer. Whatever comes from the server is set as text, never as HTML.
"use strict";

const EVERY_MS = 1000;
const PATIENCE_MS = 5000;
const KEPT_MS = 120_000; // of what was seen
const KEY = "clo-api-key";
const SVG = "http://www.w3.org/2000/svg";
const MAP_LEFT = 10; // percent of the map's width for the layers' numbers
const MAP_TOP = 16; // pixels for the KV heads' numbers
const MAP_SPAN = 0.1; // hit rates that the colours of a map span at least, or noise would look like a difference

const element = (id) => document.getElementById(id);
const show = (id, text) => { element(id).textContent = text; };
const sum = (values) => values.reduce((total, value) => total + value, 0);
const count = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => `${(share * 100).toFixed(1)} %`;

class Refusal extends Error {} // in the server's own words

let seen = []; // {at, stats}, the oldest first
let timer = null;
let asking = null; // the question that is being asked
let cells = []; // of the map of hit rates: [layers][KV heads]

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit++) bytes /= 1024;
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

function duration(seconds) {
  return seconds < 1 ? `${Number((seconds * 1000).toPrecision(3))} ms` : `${Number(seconds.toPrecision(3))} s`;
}

function state(text, bad) {
  const place = element("state");
  if (place.textContent !== text) place.textContent = text; // or screen readers would say it every second
  place.classList.toggle("bad", bad);
  element("numbers").classList.toggle("stale", bad);
}

async function ask() {
  timer = null;
  const question = new AbortController();
  asking = question;
  const patience = setTimeout(() => question.abort(), PATIENCE_MS);
  const key = sessionStorage.getItem(KEY);
  try {
    const answer = await fetch("stats", {
      headers: key === null ? {} : { Authorization: `Bearer ${key}` },
      cache: "no-store",
      signal: question.signal,
    });
    if (answer.status === 401) {
      wantKey(key !== null);
      return;
    }
    const body = await answer.json();
    if (!answer.ok) throw new Refusal(body.error.message);
    accept(body);
  } catch (error) {
    if (asking !== question) return; // the page was hidden meanwhile
    const said = error instanceof Refusal ? ` It says: ${error.message}` : "";
    state(`The server cannot be reached.${said}${seen.length ? " These numbers are old." : ""}`, true);
  } finally {
    clearTimeout(patience);
    if (asking === question) asking = null;
  }
  plan(EVERY_MS);
}

function plan(wait) {
  if (timer === null && asking === null && !document.hidden && element("ask").hidden) {
    timer = setTimeout(ask, wait);
  }
}

function pause() {
  clearTimeout(timer);
  timer = null;
  const question = asking;
  asking = null;
  question?.abort();
}

function wantKey(wrong) {
  sessionStorage.removeItem(KEY);
  state(wrong ? "The API key is wrong." : "The API key is needed.", wrong);
  element("numbers").hidden = true;
  element("ask").hidden = false;
  element("key").focus();
}

function accept(stats) {
  const at = performance.now();
  const last = seen.at(-1)?.stats;
  if (last && last.traffic.generated_tokens > stats.traffic.generated_tokens) seen = []; // it was restarted
  seen.push({ at, stats });
  seen = seen.filter((moment) => at - moment.at <= KEPT_MS);
  state(stats.state === "ready" ? "Ready." : "The model is being loaded.", false);
  element("numbers").hidden = false;
  draw();
}

function draw() {
  const { stats } = seen.at(-1);
  show("model", stats.model);
  document.title = `${stats.model} – CLO`;
  show("facts", `Attention: ${stats.attention}. Up to ${count(stats.max_model_len)} tokens a request, `
    + `${count(stats.capacity_tokens)} in all.`);
  drawRequests(stats);
  drawTokens(stats);
  drawMemory(stats);
  drawCache(stats.traffic.cache);
  drawHeads(stats);
  const oldest = seen[0].stats.traffic;
  const recent = element("period").value === "recent";
  for (const [id, field] of [["first-token", "first_token"], ["token-gap", "token_gap"]]) {
    drawHistogram(id, stats.traffic[field], recent ? oldest[field] : null);
  }
}

function drawRequests(stats) {
  const running = sum(stats.workers.map((worker) => worker.running));
  const decoding = sum(stats.workers.map((worker) => worker.decoding));
  show("admitting", count(stats.waiting));
  show("waiting", count(sum(stats.workers.map((worker) => worker.waiting))));
  show("prefilling", count(running - decoding));
  show("decoding", count(decoding));
  show("open", count(stats.open));
  const ended = stats.traffic.ended;
  show("ended", count(sum(Object.values(ended))));
  show("reasons", `Ended: ${Object.entries(ended).map(([how, n]) => `${how} ${count(n)}`).join(", ")}.`);
}

function drawTokens(stats) {
  const rates = seen.slice(1).map((moment, before) => ({
    at: moment.at,
    rate: (moment.stats.traffic.generated_tokens - seen[before].stats.traffic.generated_tokens)
      / ((moment.at - seen[before].at) / 1000),
  }));
  const now = rates.at(-1)?.rate ?? 0;
  const highest = Math.max(1, ...rates.map(({ rate }) => rate));
  show("rate", count(now));
  show("generated", count(stats.traffic.generated_tokens));
  show("prompts", count(stats.traffic.prompt_tokens));
  const end = seen.at(-1).at;
  const points = rates.map(({ at, rate }) =>
    `${(600 * (1 - (end - at) / KEPT_MS)).toFixed(1)},${(118 - 114 * rate / highest).toFixed(1)}`);
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  const chart = element("rates");
  chart.replaceChildren(line);
  chart.setAttribute("aria-label",
    `Generated tokens each second: ${count(now)} now, ${count(highest)} at most in the last two minutes`);
}

function drawMemory(stats) {
  element("stores").replaceChildren(...stats.stores.flatMap((store) => {
    const used = store.blocks - store.free_blocks;
    const share = store.blocks ? used / store.blocks : 0;
    const text = document.createElement("p");
    text.className = "note";
    text.textContent = `${store.store}: ${size(used * store.block_bytes)} of ${size(store.arena_bytes)} used, `
      + `${count(store.sequences)} sequences, ${count(store.waiting)} wait for blocks`;
    const meter = document.createElement("meter");
    meter.value = share;
    meter.setAttribute("aria-label", `${store.store}: ${Math.round(share * 100)} % used`);
    return [text, meter];
  }));
  element("workers").replaceChildren(...stats.workers.map((worker) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = worker.worker;
    const cells = [
      size(worker.index_bytes),
      size(worker.resident_bytes),
      worker.gpu_bytes ? size(worker.gpu_bytes) : "–",
      size(worker.private_bytes),
    ].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    });
    row.append(head, ...cells);
    return row;
  }));
}

function drawCache(cache) {
  const share = cache.selected_rows ? 1 - cache.fetched_rows / cache.selected_rows : null;
  show("hits", share === null ? "–" : percent(share));
  show("selected", count(cache.selected_rows));
  show("fetched", count(cache.fetched_rows));
  show("bytes", size(cache.fetched_bytes));
}

function svg(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function makeCells(layers, heads) {
  const height = Math.max(6, Math.min(14, Math.floor(480 / layers)));
  const width = (100 - MAP_LEFT) / heads;
  const chart = element("heads");
  chart.setAttribute("height", MAP_TOP + layers * height);
  const every = { layer: Math.ceil(14 / height), head: Math.ceil(heads / 12) }; // or numbers would touch
  const numbers = [];
  for (let head = 0; head < heads; head += every.head) {
    const place = { x: `${MAP_LEFT + (head + 0.5) * width}%`, y: MAP_TOP - 5, "text-anchor": "middle" };
    numbers.push(svg("text", place, head));
  }
  for (let layer = 0; layer < layers; layer += every.layer) {
    const place = { x: `${MAP_LEFT - 1.5}%`, y: MAP_TOP + (layer + 0.5) * height + 4, "text-anchor": "end" };
    numbers.push(svg("text", place, layer));
  }
  cells = Array.from({ length: layers }, (_, layer) => Array.from({ length: heads }, (_, head) => {
    const cell = svg("rect", {
      x: `${MAP_LEFT + head * width}%`, y: MAP_TOP + layer * height, width: `${width}%`, height,
    });
    cell.append(svg("title", {}));
    return cell;
  }));
  chart.replaceChildren(...numbers, ...cells.flat());
}

function drawHeads(stats) {
  const maps = stats.workers.map((worker) => worker.head_rows).filter((rows) => rows !== null);
  const chart = element("heads");
  chart.toggleAttribute("hidden", !maps.length);
  if (!maps.length) {
    show("heads-text", stats.attention === "full" ? "Full attention selects no rows." : "Nothing yet.");
    return;
  }
  const layers = maps[0].selected.length;
  const heads = maps[0].selected[0].length;
  // Cells that are there already are changed, as a new one would close the tooltip over it.
  if (cells.length !== layers || cells[0].length !== heads) makeCells(layers, heads);
  const found = cells.flatMap((row, layer) => row.map((cell, head) => {
    const selected = sum(maps.map((rows) => rows.selected[layer][head]));
    const fetched = sum(maps.map((rows) => rows.fetched[layer][head]));
    const name = `layer ${layer}, KV head ${head}`;
    const rate = selected ? 1 - fetched / selected : null;
    const said = rate === null ? "no rows selected"
      : `${percent(rate)} of ${count(selected)} selected rows were resident`;
    const title = cell.firstChild;
    if (title.textContent !== `${name}: ${said}`) title.textContent = `${name}: ${said}`;
    return { cell, name, rate };
  }));
  const used = found.filter(({ rate }) => rate !== null).sort((one, other) => one.rate - other.rate);
  const lowest = used.at(0);
  const highest = used.at(-1);
  const low = used.length ? Math.min(lowest.rate, highest.rate - MAP_SPAN) : 0;
  for (const { cell, rate } of found) {
    cell.classList.toggle("unused", rate === null);
    const share = rate === null ? 0 : (rate - low) / (highest.rate - low);
    cell.setAttribute("fill-opacity", (0.1 + 0.9 * share).toFixed(3));
  }
  const mean = sum(used.map(({ rate }) => rate)) / used.length;
  const text = used.length ? `Lowest ${percent(lowest.rate)} (${lowest.name}), highest ${percent(highest.rate)}, `
    + `${percent(mean)} on average over the heads.` : "Nothing yet.";
  show("heads-text", `A row for each layer, a column for each KV head. ${text} Stronger colours are higher rates.`);
  chart.setAttribute("aria-label", `Hit rate by layer and KV head. ${text}`);
}

function quantile(bounds, counts, total, share) {
  let below = 0;
  for (let i = 0; i < bounds.length; i++) {
    below += counts[i];
    if (below >= share * total) return `at most ${duration(bounds[i])}`;
  }
  return `above ${duration(bounds.at(-1))}`;
}

function drawHistogram(id, histogram, before) {
  const counts = histogram.counts.map((value, i) => value - (before ? before.counts[i] : 0));
  const total = sum(counts);
  const highest = Math.max(1, ...counts);
  const width = 600 / counts.length;
  const chart = element(id);
  chart.replaceChildren(...counts.map((value, i) => {
    const height = value && Math.max(2, 116 * value / highest);
    const bar = document.createElementNS(SVG, "rect");
    const place = { x: i * width + 1, y: 120 - height, width: width - 2, height };
    for (const [name, number] of Object.entries(place)) bar.setAttribute(name, number.toFixed(1));
    const title = document.createElementNS(SVG, "title");
    const limit = i < histogram.bounds.length ? `at most ${duration(histogram.bounds[i])}`
      : `above ${duration(histogram.bounds.at(-1))}`;
    title.textContent = `${limit}: ${count(value)}`;
    bar.append(title);
    return bar;
  }));
  let text = "Nothing yet.";
  if (total) {
    const half = quantile(histogram.bounds, counts, total, 0.5);
    const most = quantile(histogram.bounds, counts, total, 0.99);
    const mean = (histogram.sum - (before ? before.sum : 0)) / total;
    text = `${count(total)} in all, ${duration(mean)} on average; half ${half}, 99 % ${most}. `
      + `Bars from ${duration(histogram.bounds[0])} on the left to above ${duration(histogram.bounds.at(-1))}.`;
  }
  show(`${id}-text`, text);
  chart.setAttribute("aria-label", text);
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, element("key").value.trim());
  element("key").value = "";
  element("ask").hidden = true;
  state("Connecting.", false);
  plan(0);
});
element("period").addEventListener("change", () => { if (seen.length) draw(); });
document.addEventListener("visibilitychange", () => document.hidden ? pause() : plan(0));
plan(0);
