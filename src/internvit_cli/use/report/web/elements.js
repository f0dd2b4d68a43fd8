// The data, and elements made of it. Text is only ever set as text: nothing from outside is read as markup.

const data = JSON.parse(document.getElementById('data').textContent);
const images = data.images;

/** An element with attributes, listeners (`onclick`) and children; strings among them become text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children);
  return node;
}

const byId = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString('en');
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const words = (text) => text.replaceAll('_', ' ');

function bytes(number) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB', 'PB'];
  let unit = 0;
  for (; number >= 1000 && unit < units.length - 1; unit += 1) number /= 1000;
  return `${unit ? number.toFixed(1) : number} ${units[unit]}`;
}

function seconds(number) {
  if (number < 60) return `${number.toFixed(1)} s`;
  const minutes = Math.round(number / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A table that scrolls in its own box; columns are [title, class]. */
function table(caption, columns, rows, tall = false) {
  const head = make('tr', {}, ...columns.map(([title, kind = '']) => make('th', { scope: 'col', class: kind }, title)));
  const cells = (row) => row.map((value, place) => make('td', { class: columns[place][1] ?? '' }, value));
  const body = make('tbody', {}, ...rows.map((row) => make('tr', {}, ...cells(row))));
  const whole = make('table', { 'aria-label': caption }, make('thead', {}, head), body);
  return make('div', { class: tall ? 'scroll tall' : 'scroll', tabindex: 0, role: 'region', 'aria-label': caption }, whole);
}

/** A table of names and values. */
function factTable(caption, rows) {
  const lines = rows.map(([name, value]) => make('tr', {}, make('th', { scope: 'row' }, name), make('td', {}, value)));
  return make('div', { class: 'scroll' }, make('table', { class: 'facts', 'aria-label': caption }, make('tbody', {}, ...lines)));
}

/** What is shown of an image beside its picture. */
const sizeOf = (image) => `${count(images.width[image])} x ${count(images.height[image])} px, ${plural(images.tiles[image], 'tile')}`;

/** An image's thumbnail, or why there is none. */
function thumbnail(image) {
  const picture = data.thumbnails.pictures[image];
  if (picture) return make('img', { class: 'thumb', src: `data:image/jpeg;base64,${picture}`, alt: `thumbnail of ${images.keys[image]}` });
  const problem = data.thumbnails.problems[image];
  const why = problem ?? 'not among the thumbnails of this page';
  return make('div', { class: 'thumb', title: why }, problem ? shortProblem(problem) : 'no thumbnail drawn');
}

/** The end of a reason: its beginning is the picture's path. */
function shortProblem(problem) {
  const known = ['cannot be read', 'changed since it was encoded', 'has another size', 'never was a file'];
  const found = known.find((words_) => problem.includes(words_));
  return found === 'has another size' ? 'picture changed' : found ?? problem.slice(0, 60);
}
