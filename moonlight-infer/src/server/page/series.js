// The points of curves: what a run's records contain, thinned, smoothed and placed on axes.

/** Records of a split that are kept. Of more, every second one is dropped. */
const MAX_RECORDS = 8000;

/** The records of a run, filled in parts. */
export class RunRecords {
  constructor() {
    this.clear();
  }

  clear() {
    this.train = [];
    this.valid = [];
    this.next = 0;
    this.file = null;
    this.every = 1;
    this.halved = 1;
    this.damaged = 0;
    this.clock = { seconds: 0, tokens: 0 };
  }

  /** Adds an answer of `/api/runs/{name}/metrics`. Returns whether anything changed. */
  add(part) {
    if (part.restarted) this.clear();
    this.next = part.next;
    this.file = part.file;
    this.every = part.every;
    this.damaged += part.damaged;
    for (const record of part.records) {
      const list = record.split === "valid" ? this.valid : this.train;
      // A run that resumes takes steps again; the later line is the one that counts.
      while (list.length > 0 && list.at(-1).step >= record.step) list.pop();
      if (record.tokens_per_second > 0 && record.tokens > this.clock.tokens) {
        this.clock.seconds += (record.tokens - this.clock.tokens) / record.tokens_per_second;
        this.clock.tokens = record.tokens;
      }
      record.seconds = this.clock.seconds;
      list.push(record);
    }
    while (this.train.length > MAX_RECORDS) {
      this.train = this.train.filter((_, index) => index % 2 === 1);
      this.halved *= 2;
    }
    while (this.valid.length > MAX_RECORDS) this.valid = this.valid.filter((_, index) => index % 2 === 1);
    return part.restarted || part.records.length > 0;
  }

  /** What the curves leave out, as phrases. */
  notes() {
    const every = this.every * this.halved;
    const steps = every > 1 ? [`one of ${every.toLocaleString("en")} steps is drawn`] : [];
    const lines = this.damaged === 1 ? "1 damaged line is" : `${this.damaged.toLocaleString("en")} damaged lines are`;
    return [...steps, ...(this.damaged > 0 ? [`${lines} ignored`] : [])];
  }

  /** `[x, y]` of a metric. */
  points(split, metric, axis) {
    const found = [];
    for (const record of this[split]) {
      const [x, y] = [record[axis], record[metric]];
      if (Number.isFinite(x) && Number.isFinite(y)) found.push([x, y]);
    }
    return found;
  }
}

/** An exponential moving average, corrected for its start as in Adam. */
export function smooth(points, weight) {
  if (weight <= 0) return points;
  let [mean, norm] = [0, 0];
  return points.map(([x, y]) => {
    mean = weight * mean + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return [x, mean / norm];
  });
}

/** The first, lowest, highest and last point of each pixel: a curve of any length looks the same with at most four of each. */
export function thin(points, pixelOf) {
  if (points.length < 1500) return points;
  const thinned = [];
  let bucket = [];
  const flush = () => {
    if (bucket.length === 0) return;
    const low = bucket.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = bucket.reduce((a, b) => (b[1] > a[1] ? b : a));
    const kept = new Set([bucket[0], low, high, bucket.at(-1)]);
    thinned.push(...bucket.filter((point) => kept.has(point)));
  };
  let pixel = null;
  for (const point of points) {
    const at = Math.round(pixelOf(point[0]));
    if (at !== pixel) {
      flush();
      [bucket, pixel] = [[], at];
    }
    bucket.push(point);
  }
  flush();
  return thinned;
}

/** Round numbers from `low` to `high`, about `count` of them. */
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= rough * 0.999);
  const found = [];
  // One number does not make an axis.
  if (count < 40 && Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) < 1) return ticks(low, high, count * 2);
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
  return found;
}

/** Powers of ten between `low` and `high`, with 2 and 5 of each if there are few. */
export function logTicks(low, high) {
  const found = [];
  const powers = Math.log10(high / low);
  const factors = powers < 0.7 ? null : powers < 2.5 ? [1, 2, 5] : [1];
  if (!factors) return ticks(low, high, 4).filter((tick) => tick > 0);
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
    }
  }
  return found.length > 8 ? found.filter((_, index) => index % Math.ceil(found.length / 8) === 0) : found;
}

/** The point of a curve that is nearest to `x`. */
export function nearest(points, x) {
  let [low, high] = [0, points.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1;
    else high = middle;
  }
  const [before, after] = [points[low - 1], points[low]];
  return before && Math.abs(before[0] - x) <= Math.abs((after?.[0] ?? Infinity) - x) ? before : after;
}
