// Build elements from the data. Text is only inserted as text, so nothing from outside is parsed as markup.

const data = JSON.parse(document.getElementById('data').textContent);
const images = data.images;

/** Create an element with attributes, listeners (`onclick`) and children; strings become text. */
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
  if (number < 59.95) return `${number.toFixed(1)} s`;
  const whole = Math.round(number);
  const minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${count(Math.floor(minutes / 60))} h ${minutes % 60} min`;
}

/** Shorten a long text to its beginning and its end, because the end of a key identifies it. */
function shortened(text, most) {
  const letters = [...text];
  if (letters.length <= most) return text;
  const head = Math.floor(most / 3);
  return `${letters.slice(0, head).join('')}\u2026${letters.slice(head + 1 - most).join('')}`;
}

/** Create a box that fades where it can be scrolled, and has a tab stop only if it can be. */
function scroller(box) {
  const look = () => {
    const right = box.scrollWidth - box.clientWidth - box.scrollLeft;
    const below = box.scrollHeight - box.clientHeight - box.scrollTop;
    for (const [side, hidden] of [['left', box.scrollLeft], ['right', right], ['below', below]]) box.classList.toggle(`more-${side}`, hidden > 1);
    if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0;
    else box.removeAttribute('tabindex');
  };
  box.addEventListener('scroll', look, { passive: true });
  const sizes = new ResizeObserver(look);
  for (const one of [box, ...box.children]) sizes.observe(one);
  return box;
}

/** Create a table in its own box; columns are [title, class]. On a phone, each row becomes a block of named values unless the table is narrow. */
function table(caption, columns, rows, kind = '') {
  const head = make('tr', { role: 'row' }, ...columns.map(([title, kind = '']) => make('th', { scope: 'col', role: 'columnheader', class: kind }, title)));
  const cell = (value, place) => make('td', { role: 'cell', class: columns[place][1] ?? '', 'data-title': columns[place][0] }, make('span', {}, value));
  const body = make('tbody', { role: 'rowgroup' }, ...rows.map((row) => make('tr', { role: 'row' }, ...row.map((value, place) => value === '' ? make('td', { role: 'cell', 'data-empty': true }) : cell(value, place)))));
  const whole = make('table', { class: kind === 'narrow' ? '' : 'stacks', role: 'table', 'aria-label': caption }, make('thead', { role: 'rowgroup' }, head), body);
  return scroller(make('div', { class: kind === 'tall' ? 'scroll tall' : 'scroll', role: 'region', 'aria-label': caption }, whole));
}

/** Create a table of names and values. */
function factTable(caption, rows) {
  const lines = rows.map(([name, value]) => make('tr', {}, make('th', { scope: 'row' }, name), make('td', {}, value)));
  return make('table', { class: 'facts', 'aria-label': caption }, make('tbody', {}, ...lines));
}

/** Return the text beside the picture of an image. */
const sizeOf = (image) => `${count(images.width[image])} x ${count(images.height[image])} px, ${plural(images.tiles[image], 'tile')}`;

/** Create the thumbnail of an image, or a text that says why there is none. */
function thumbnail(image) {
  const picture = data.thumbnails.pictures[image];
  if (picture) return make('img', { class: 'thumb', src: `data:image/jpeg;base64,${picture}`, alt: `thumbnail of ${images.keys[image]}` });
  const problem = data.thumbnails.problems[image];
  const why = problem ?? 'not among the thumbnails of this page';
  return make('div', { class: 'thumb', title: why }, problem ? shortProblem(problem) : 'no thumbnail drawn');
}

/** Return a reason without the leading path, which the map shows in full. */
function shortProblem(problem) {
  const reason = problem.slice(problem.lastIndexOf(': ') + 1).trim();
  return shortened(reason.includes('changed since') ? 'changed since it was encoded' : reason.includes('SHA-256') ? 'no SHA-256 stored' : reason, 48);
}
